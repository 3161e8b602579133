// SPDX-License-Identifier: Apache-2.0
// torch.ops.osora_emulated: the CUDA kernels, run by the emulator on CPU tensors. Checks, dtypes and glue are those of
// the real operators, so that one test function serves both.
#include <torch/library.h>

#include "core/svd_drivers_limits.h"
#include "grid.h"
#include "torch/common/checks.h"
#include "torch/fold/fold_launch.h"
#include "torch/fold/fold_many_launch.h"

namespace osora {
namespace {

at::Tensor ready(const at::Tensor& t, at::ScalarType type) { return t.to(type).contiguous(); }

at::Tensor fold_emulated(const at::Tensor& U, const at::Tensor& S0, const at::Tensor& s, const at::Tensor& o) {
  check_fold(U, S0, s, o);
  const auto exact = accumulate_type(U.scalar_type());
  return fold_launch(U.contiguous(), ready(S0, exact), ready(s, exact), ready(o, exact), /*stream=*/nullptr);
}

std::tuple<at::Tensor, at::Tensor> fold_backward_emulated(const at::Tensor& U, const at::Tensor& P,
                                                          const at::Tensor& S0, const at::Tensor& s,
                                                          const at::Tensor& o, bool need_s, bool need_o) {
  check_fold_backward(U, P, S0, s, o);
  const auto exact = accumulate_type(U.scalar_type());
  return fold_backward_launch(U.contiguous(), P.contiguous(), ready(S0, exact), ready(s, exact), ready(o, exact),
                              need_s, need_o, /*stream=*/nullptr);
}

std::vector<at::Tensor> fold_many_emulated(at::TensorList U, at::TensorList S0, at::TensorList s, at::TensorList o) {
  check_fold_many(U, S0, s, o);
  if (U.empty()) return {};
  return fold_many_launch(fold_inputs(U, S0, s, o), /*stream=*/nullptr);
}

void svd_driver_limits(int64_t method, int64_t d, int64_t k, int64_t rank, int64_t itemsize) {
  core::refuse_driver(core::SvdMethod{method}, d, k, rank, itemsize);
}
void svd_driver_workspace(int64_t method, int64_t numbers) { core::refuse_workspace(core::SvdMethod{method}, numbers); }

}  // namespace

TORCH_LIBRARY(osora_emulated, m) {
  m.def("fold(Tensor U, Tensor S0, Tensor s, Tensor o) -> Tensor");
  m.def(
      "fold_backward(Tensor U, Tensor P, Tensor S0, Tensor s, Tensor o, bool need_s, bool need_o) -> (Tensor, Tensor)");
  m.def("fold_many(Tensor[] U, Tensor[] S0, Tensor[] s, Tensor[] o) -> Tensor[]");
  m.def("svd_driver_limits", &svd_driver_limits);
  m.def("svd_driver_workspace", &svd_driver_workspace);
  m.def("launches() -> int", [] { return emulation::launches.load(); });  // of kernels, so far
}
TORCH_LIBRARY_IMPL(osora_emulated, CPU, m) {
  m.impl("fold", &fold_emulated);
  m.impl("fold_backward", &fold_backward_emulated);
  m.impl("fold_many", &fold_many_emulated);
}

}  // namespace osora
