// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>

namespace osora::cuda {

// "major.minor.patch" of the headers we were compiled with and of the library that is loaded now.
struct LibraryVersions {
  std::string compiled, loaded;
};

// Neither needs a GPU.
LibraryVersions cublas_versions();
LibraryVersions cusolver_versions();

}  // namespace osora::cuda
