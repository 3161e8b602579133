# SPDX-License-Identifier: Apache-2.0
# Enables the CUDA language.
#
# OSORA_CUDA_ARCHS ("8.0;9.0+PTX") -> CMAKE_CUDA_ARCHITECTURES ("80-real;90-real;90-virtual")
# and, for build_info(), OSORA_ARCH_NAMES ("sm_80;sm_90;compute_90").
if(NOT OSORA_CUDA_ARCHS)
  set(OSORA_CUDA_ARCHS "$ENV{TORCH_CUDA_ARCH_LIST}")
endif()
if(NOT OSORA_CUDA_ARCHS)
  set(OSORA_CUDA_ARCHS "8.0;9.0;10.0;12.0+PTX")
endif()
string(REGEX REPLACE "[ ,]+" ";" _cards "${OSORA_CUDA_ARCHS}")
set(CMAKE_CUDA_ARCHITECTURES)
set(OSORA_ARCH_NAMES)
foreach(_card IN LISTS _cards)
  if(NOT _card MATCHES "^([0-9]+)\\.([0-9][af]?)(\\+PTX)?$")
    message(FATAL_ERROR "OSORA_CUDA_ARCHS must look like 8.0;9.0+PTX, got ${_card}")
  endif()
  set(_number ${CMAKE_MATCH_1}${CMAKE_MATCH_2})
  list(APPEND CMAKE_CUDA_ARCHITECTURES ${_number}-real)
  list(APPEND OSORA_ARCH_NAMES sm_${_number})
  if(CMAKE_MATCH_3)
    list(APPEND CMAKE_CUDA_ARCHITECTURES ${_number}-virtual)
    list(APPEND OSORA_ARCH_NAMES compute_${_number})
  endif()
endforeach()
# Ours is linked by name in CudaMath.cmake: the same libcudart that torch has loaded.
set(CMAKE_CUDA_RUNTIME_LIBRARY None)

# CMake tries the compiler by linking a program. pip's nvcc looks for the runtime in lib64, but it lies in lib.
if(CMAKE_CUDA_COMPILER)
  get_filename_component(_nvcc_root ${CMAKE_CUDA_COMPILER} DIRECTORY)
  set(ENV{LIBRARY_PATH} "${_nvcc_root}/../lib:$ENV{LIBRARY_PATH}")
endif()
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
