// SPDX-License-Identifier: Apache-2.0
// The linear operator on a materialised weight, and its gradient: one product for y, one for h, one for dx. The
// products are ATen's; one source serves CPU and CUDA.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "torch/common/guards.h"
#include "torch/fold/fold.h"
#include "torch/linear/checks_materialised.h"
#include "torch/linear/materialised.h"
#include "torch/linear/products.h"
#include "torch/linear/rows.h"

namespace osora {
namespace {

std::tuple<at::Tensor, at::Tensor> linear_effective(const at::Tensor& x, const at::Tensor& weight,
                                                    const std::optional<at::Tensor>& bias, const at::Tensor& U,
                                                    const at::Tensor& V, const at::Tensor& S0, const at::Tensor& s,
                                                    const at::Tensor& o, bool need_h) {
  check_linear_effective(x, weight, bias, U, V, S0, s, o);
  const OperatorGuard guard(x.device());
  const auto effective = effective_weight({weight, U, V, S0, s, o}, x.scalar_type());
  auto h = need_h ? down_product(as_rows(x), V.to(x.scalar_type())) : at::empty({0}, x.options());
  return {at::linear(x, effective, bias).contiguous(), h};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_effective_backward(const at::Tensor& dy, const at::Tensor& h,
                                                                         const at::Tensor& weight, const at::Tensor& U,
                                                                         const at::Tensor& V, const at::Tensor& S0,
                                                                         const at::Tensor& s, const at::Tensor& o,
                                                                         bool need_x, bool need_s, bool need_o) {
  check_linear_effective_backward(dy, h, weight, U, V, S0, s, o, need_s || need_o);
  const OperatorGuard guard(dy.device());
  const auto rows = as_rows(dy);
  auto dx = at::empty({0}, dy.options());
  if (need_x) {
    dx = at::mm(rows, effective_weight({weight, U, V, S0, s, o}, dy.scalar_type())).view(with_last(dy, V.size(0)));
  }
  const auto sums = dy.options().dtype(accumulate_type(dy.scalar_type()));
  auto ds = at::empty({0}, sums), d_o = at::empty({0}, sums);
  if (need_s || need_o) std::tie(ds, d_o) = fold_backward(U, outer_sum(rows, h), S0, s, o, need_s, need_o);
  return {dx, ds, d_o};
}

void effective_refresh_op(const at::Tensor& weight, const at::Tensor& U, const at::Tensor& V, const at::Tensor& S0,
                          const at::Tensor& s, const at::Tensor& o) {
  check_effective("osora::effective_refresh", weight.scalar_type(), weight, U, V, S0, s, o);
  const OperatorGuard guard(weight.device());
  effective_refresh({weight, U, V, S0, s, o});
}

}  // namespace

TORCH_LIBRARY_IMPL(osora, CPU, m) {
  m.impl("linear_effective", &linear_effective);
  m.impl("linear_effective_backward", &linear_effective_backward);
  m.impl("effective_refresh", &effective_refresh_op);
}

#ifdef OSORA_CUDA
TORCH_LIBRARY_IMPL(osora, CUDA, m) {
  m.impl("linear_effective", &linear_effective);
  m.impl("linear_effective_backward", &linear_effective_backward);
  m.impl("effective_refresh", &effective_refresh_op);
}
#endif

TORCH_LIBRARY_IMPL(osora, CompositeExplicitAutograd, m) {
  m.impl("effective_drop", &effective_drop);
  m.impl("effective_kept", &effective_kept);
}

}  // namespace osora
