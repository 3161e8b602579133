# SPDX-License-Identifier: Apache-2.0
# osora::cuda_math - headers and libraries of the CUDA runtime, cuBLAS and cuSOLVER.
#
# Two layouts. A classic toolkit has everything under one root. pip's wheels put headers and libraries under
# site-packages/nvidia/cu<major>, with versioned names only (libcusolver.so.12), while nvcc and its own headers
# (crt/host_defines.h) may lie elsewhere: then nvcc's include folder goes first. (pip's wheels for CUDA 12 have a
# folder per library instead.) pip's libraries are preferred: they are the ones torch loads.
string(REGEX MATCH "^[0-9]+" _major "${CMAKE_CUDA_COMPILER_VERSION}")
get_filename_component(_site "${OSORA_TORCH_DIR}/.." ABSOLUTE)
set(_wheels "${_site}/nvidia/cu${_major}")
if(_major EQUAL 12)
  list(APPEND _wheels "${_site}/nvidia/cuda_runtime" "${_site}/nvidia/cublas" "${_site}/nvidia/cusolver")
endif()
get_filename_component(_nvcc_root "${CMAKE_CUDA_COMPILER}" REALPATH)
get_filename_component(_nvcc_root "${_nvcc_root}/../.." ABSOLUTE)
set(_roots ${CMAKE_CUDA_COMPILER_TOOLKIT_ROOT} ${CMAKE_CUDA_COMPILER_LIBRARY_ROOT} ${_nvcc_root})
list(REMOVE_DUPLICATES _roots)

function(osora_find_header variable name package)
  find_path(${variable} ${name} NO_CACHE
    HINTS ${_wheels} ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES} ${_roots} PATH_SUFFIXES include)
  if(NOT ${variable})
    message(FATAL_ERROR "${name} not found: install the CUDA toolkit or `pip install ${package}`, or set OSORA_CUDA=0")
  endif()
  set(${variable} ${${variable}} PARENT_SCOPE)
endfunction()

function(osora_find_library variable name package)
  set(_found)
  foreach(_wheel IN LISTS _wheels)
    file(GLOB _here "${_wheel}/lib/lib${name}.so.[0-9]*")
    list(APPEND _found ${_here})
  endforeach()
  if(_found)
    list(GET _found 0 _library)
  else()
    find_library(_library ${name} NO_CACHE
      HINTS ${_roots} ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES} PATH_SUFFIXES lib64 lib lib/x64)
  endif()
  if(NOT _library)
    message(FATAL_ERROR "lib${name} not found: install the CUDA toolkit or `pip install ${package}`, or set OSORA_CUDA=0")
  endif()
  set(${variable} ${_library} PARENT_SCOPE)
endfunction()

osora_find_header(OSORA_CUDART_INCLUDE cuda_runtime_api.h nvidia-cuda-runtime)
osora_find_header(OSORA_CUBLAS_INCLUDE cublas_v2.h nvidia-cublas)
osora_find_header(OSORA_CUSOLVER_INCLUDE cusolverDn.h nvidia-cusolver)
osora_find_library(OSORA_CUDART cudart nvidia-cuda-runtime)
osora_find_library(OSORA_CUBLAS cublas nvidia-cublas)
osora_find_library(OSORA_CUSOLVER cusolver nvidia-cusolver)

set(_includes ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES} ${OSORA_CUDART_INCLUDE} ${OSORA_CUBLAS_INCLUDE}
  ${OSORA_CUSOLVER_INCLUDE})
list(REMOVE_DUPLICATES _includes)
add_library(osora_cuda_math INTERFACE)
add_library(osora::cuda_math ALIAS osora_cuda_math)
target_include_directories(osora_cuda_math SYSTEM INTERFACE ${_includes})
target_link_libraries(osora_cuda_math INTERFACE ${OSORA_CUSOLVER} ${OSORA_CUBLAS} ${OSORA_CUDART})

# Where the loader looks: beside torch for pip's layout, else in the toolkit's own folder.
set(OSORA_CUDA_RPATH)
foreach(_library IN ITEMS ${OSORA_CUDART} ${OSORA_CUBLAS} ${OSORA_CUSOLVER})
  get_filename_component(_folder ${_library} DIRECTORY)
  string(REPLACE "${_site}/" "$ORIGIN/../" _folder "${_folder}")
  list(APPEND OSORA_CUDA_RPATH ${_folder})
endforeach()
list(REMOVE_DUPLICATES OSORA_CUDA_RPATH)
