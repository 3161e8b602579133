// SPDX-License-Identifier: Apache-2.0
// The linear operator and its gradient. The big products are ATen's (MKL, oneDNN, cuBLAS), the fold and its
// reduction ours; one source serves CPU and CUDA.
//
// The small product comes first and the big one accumulates into it in place (beta = 1): that hides one pass over y,
// and rounds the big term once (docs/method.md, "Order of the products").
#include "torch/linear/linear.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "core/linear_plan.h"
#include "torch/common/checks.h"
#include "torch/common/guards.h"
#include "torch/fold/fold.h"
#include "torch/linear/decode.h"
#include "torch/linear/products.h"
#include "torch/linear/rows.h"
#ifdef OSORA_CUDA
#include "torch/linear/on_cuda.h"
#endif

namespace osora {

using Optional = std::optional<at::Tensor>;

at::Tensor linear_plus(const at::Tensor& x, const at::Tensor& rows, const Optional& weight, const Optional& bias,
                       const at::Tensor& h, const at::Tensor& D) {
  if (weight && x.dim() > 2 && !x.is_contiguous()) {
    // torch's own linear multiplies such an x matrix by matrix and rounds before it adds the bias. So that an adapter
    // of zeros gives its very bits, it comes first here; such an x is rare, and copied anyway.
    auto y = at::linear(x, *weight, bias).contiguous();
    y.view({h.size(0), D.size(0)}).addmm_(h, D.t());
    return y;
  }
  auto y = bias ? at::addmm(*bias, h, D.t()) : at::mm(h, D.t());
  if (weight) y.addmm_(rows, weight->t());
  return y.view(with_last(x, D.size(0)));
}

namespace {

std::tuple<at::Tensor, at::Tensor> linear(const at::Tensor& x, const Optional& weight, const Optional& bias,
                                          const at::Tensor& U, const at::Tensor& V, const at::Tensor& S0,
                                          const at::Tensor& s, const at::Tensor& o) {
  check_linear(x, weight, bias, U, V, S0, s, o);
  const OperatorGuard guard(x.device());
  const auto rows = as_rows(x);
#ifdef OSORA_CUDA
  if (plan_linear(rows, weight, U, V) == core::LinearPlan::kDecode) {
    auto [y, h] = decode_cuda(decode_inputs(rows, weight, bias, U, V, S0, s, o, {}, {}));
    return {y.view(with_last(x, U.size(0))), h};
  }
#endif
  auto h = down_product(rows, V);
  return {linear_plus(x, rows, weight, bias, h, fold(U, S0, s, o)), h};
}

at::Tensor down(const at::Tensor& x, const at::Tensor& V) {
  check_down(x, V);
  const OperatorGuard guard(x.device());
  return down_product(as_rows(x), V);
}

at::Tensor up(const at::Tensor& x, const at::Tensor& h, const Optional& weight, const Optional& bias,
              const at::Tensor& U, const at::Tensor& S0, const at::Tensor& s, const at::Tensor& o, const Optional& D) {
  check_up(x, h, weight, bias, U, S0, s, o);
  check_folded("osora::up", D, U);
  const OperatorGuard guard(x.device());
  return linear_plus(x, as_rows(x), weight, bias, h, D ? *D : fold(U, S0, s, o));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward(const at::Tensor& dy, const at::Tensor& h,
                                                               const Optional& weight, const at::Tensor& U,
                                                               const at::Tensor& V, const at::Tensor& S0,
                                                               const at::Tensor& s, const at::Tensor& o, bool need_x,
                                                               bool need_s, bool need_o, const Optional& folded) {
  check_linear_backward(dy, h, weight, U, V, S0, s, o);
  check_folded("osora::linear_backward", folded, U);
  const OperatorGuard guard(dy.device());
  const auto rows = as_rows(dy);
  auto dx = at::empty({0}, dy.options());
  if (need_x) {
    const auto D = folded ? *folded : fold(U, S0, s, o);
    const bool first = weight && core::sums_weight_first(rows.size(0), U.size(0), V.size(0));
    if (const auto sum = first ? summed_weight(*weight, D, V) : std::nullopt) {
      dx = at::mm(rows, *sum);
    } else {
      dx = at::mm(at::mm(rows, D), V.t());
      if (weight) dx.addmm_(rows, *weight);
    }
    dx = dx.view(with_last(dy, V.size(0)));
  }
  const auto sums = dy.options().dtype(accumulate_type(dy.scalar_type()));
  auto ds = at::empty({0}, sums), d_o = at::empty({0}, sums);
  if (need_s || need_o) std::tie(ds, d_o) = fold_backward(U, outer_sum(rows, h), S0, s, o, need_s, need_o);
  return {dx, ds, d_o};
}

}  // namespace

TORCH_LIBRARY_IMPL(osora, CPU, m) {
  m.impl("linear", &linear);
  m.impl("down", &down);
  m.impl("up", &up);
  m.impl("linear_backward", &linear_backward);
}

#ifdef OSORA_CUDA
TORCH_LIBRARY_IMPL(osora, CUDA, m) {
  m.impl("linear", &linear);
  m.impl("down", &down);
  m.impl("up", &up);
  m.impl("linear_backward", &linear_backward);
}
#endif

}  // namespace osora
