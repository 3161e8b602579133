# SPDX-License-Identifier: Apache-2.0
# osora::warnings - always many; fatal where OSORA_WERROR is on (CI).
add_library(osora_warnings INTERFACE)
add_library(osora::warnings ALIAS osora_warnings)
set(_cxx -Wall -Wextra)
set(_cuda -Xcompiler=-Wall,-Wextra)
if(OSORA_WERROR)
  list(APPEND _cxx -Werror)
  list(APPEND _cuda -Werror=all-warnings -Xcompiler=-Werror)
endif()
target_compile_options(osora_warnings INTERFACE
  "$<$<COMPILE_LANGUAGE:CXX>:${_cxx}>" "$<$<COMPILE_LANGUAGE:CUDA>:${_cuda}>")
