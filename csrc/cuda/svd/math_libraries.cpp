// SPDX-License-Identifier: Apache-2.0
#include "cuda/svd/math_libraries.h"

#include <cublas_v2.h>
#include <cusolverDn.h>
#include <library_types.h>

#include <stdexcept>

namespace osora::cuda {
namespace {

std::string dotted(int major, int minor, int patch) {
  return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch);
}

// cublasGetProperty and cusolverGetProperty have the same form; `success` is 0 in both.
template <class Status>
std::string loaded(Status (*property)(libraryPropertyType, int*), const char* name) {
  const libraryPropertyType asked[] = {MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL};
  int value[3] = {};
  for (int i = 0; i < 3; ++i) {
    if (static_cast<int>(property(asked[i], &value[i])) != 0) {
      throw std::runtime_error(std::string(name) + " does not tell its version");
    }
  }
  return dotted(value[0], value[1], value[2]);
}

}  // namespace

LibraryVersions cublas_versions() {
  return {dotted(CUBLAS_VER_MAJOR, CUBLAS_VER_MINOR, CUBLAS_VER_PATCH), loaded(cublasGetProperty, "cuBLAS")};
}

LibraryVersions cusolver_versions() {
  return {dotted(CUSOLVER_VER_MAJOR, CUSOLVER_VER_MINOR, CUSOLVER_VER_PATCH), loaded(cusolverGetProperty, "cuSOLVER")};
}

}  // namespace osora::cuda
