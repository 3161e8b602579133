# SPDX-License-Identifier: Apache-2.0
# osora::torch - headers and libraries of the torch we compile against.
#
# Not find_package(Torch): with a CUDA build of torch that stops the whole configure step where no CUDA toolkit is
# installed, and it replaces CMAKE_CUDA_ARCHITECTURES by flags of its own.
if(NOT OSORA_TORCH_DIR)
  execute_process(COMMAND ${Python_EXECUTABLE} -c "import torch; print(torch.__path__[0], torch.__version__, sep=';')"
    OUTPUT_VARIABLE _torch OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  list(GET _torch 0 _dir)
  list(GET _torch 1 _version)
  set(OSORA_TORCH_DIR ${_dir} CACHE PATH "" FORCE)
  set(OSORA_TORCH_VERSION ${_version} CACHE STRING "" FORCE)
endif()
if(NOT EXISTS ${OSORA_TORCH_DIR}/include/torch/library.h)
  message(FATAL_ERROR "OSORA_TORCH_DIR=${OSORA_TORCH_DIR} holds no torch headers")
endif()

add_library(osora_torch INTERFACE)
add_library(osora::torch ALIAS osora_torch)
target_include_directories(osora_torch SYSTEM INTERFACE
  ${OSORA_TORCH_DIR}/include ${OSORA_TORCH_DIR}/include/torch/csrc/api/include)
target_link_directories(osora_torch INTERFACE ${OSORA_TORCH_DIR}/lib)
target_link_libraries(osora_torch INTERFACE torch torch_cpu c10)
# at::parallel_for is a template and runs in parallel only where OpenMP is on. Compile with it, but link none:
# the runtime must be the one torch has loaded, so that torch.set_num_threads() holds for us too.
target_compile_options(osora_torch INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:-fopenmp>")
if(OSORA_CUDA)
  target_link_libraries(osora_torch INTERFACE torch_cuda c10_cuda)
endif()
