// SPDX-License-Identifier: Apache-2.0
// osora._C. Loading it registers torch.ops.osora.* (csrc/torch/schema.cpp); build_info() is all it exports.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "build_config.h"
#ifdef OSORA_CUDA
#include "cuda/svd/math_libraries.h"
#endif

namespace py = pybind11;

namespace {

py::list split(const std::string& text) {
  py::list parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ';');) parts.append(part);
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["version"] = OSORA_VERSION;
  info["commit"] = OSORA_COMMIT;
  info["torch"] = OSORA_TORCH_VERSION;
  info["python"] = OSORA_PYTHON_VERSION;
  info["compiler"] = OSORA_COMPILER;
  info["reason"] = OSORA_REASON;
#ifdef OSORA_CUDA
  const auto cublas = osora::cuda::cublas_versions(), cusolver = osora::cuda::cusolver_versions();
  info["cuda"] = true;
  info["cuda_version"] = OSORA_CUDA_VERSION;
  info["archs"] = split(OSORA_ARCH_NAMES);
  info["cublas"] = cublas.compiled;
  info["cublas_loaded"] = cublas.loaded;
  info["cusolver"] = cusolver.compiled;
  info["cusolver_loaded"] = cusolver.loaded;
#else
  info["cuda"] = false;
  info["archs"] = split("");
  for (const char* key : {"cuda_version", "cublas", "cublas_loaded", "cusolver", "cusolver_loaded"}) {
    info[key] = py::none();
  }
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of osora: registers torch.ops.osora and tells how it was built.";
  m.def("build_info", &build_info, "Versions this extension was compiled with and found, as a dict.");
}
