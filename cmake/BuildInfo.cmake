# SPDX-License-Identifier: Apache-2.0
# Writes generated/build_config.h, the facts that build_info() reports, and generated/_compiled_for.py, which
# _load.py reads before it opens the extension: with another torch, opening it may already crash.
file(STRINGS pyproject.toml _line REGEX "^version = ")
string(REGEX REPLACE "^version = \"(.*)\"$" "\\1" OSORA_VERSION "${_line}")

set(OSORA_COMMIT unknown)
if(EXISTS ${PROJECT_SOURCE_DIR}/.git)  # not a git repository around an unpacked source distribution
  execute_process(COMMAND git describe --always --dirty --tags WORKING_DIRECTORY ${PROJECT_SOURCE_DIR}
    OUTPUT_VARIABLE _described OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE _failed)
  if(NOT _failed AND _described)
    set(OSORA_COMMIT ${_described})
  endif()
endif()
configure_file(cmake/build_config.h.in generated/build_config.h @ONLY)
file(CONFIGURE OUTPUT generated/_compiled_for.py CONTENT [[
"""Written by the build: the torch that the extension was compiled for."""

TORCH = "@OSORA_TORCH_VERSION@"
]] @ONLY)
