// SPDX-License-Identifier: Apache-2.0
// The linear operator and its gradient. The big products are ATen's (MKL, oneDNN, cuBLAS), the fold and its
// reduction ours; one source serves CPU and CUDA.
//
// The small product comes first and the big one accumulates into it in place (beta = 1): that hides one pass over y,
// and rounds the big term once (docs/method.md, "Order of the products").
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "torch/checks.h"
#include "torch/decode.h"
#include "torch/fold.h"
#include "torch/guards.h"

namespace osora {
namespace {

using Optional = std::optional<at::Tensor>;

// t[..., c] as [n, c] in a layout GEMM takes as it is (one unit stride, no overlap); copies only if it must.
at::Tensor as_rows(const at::Tensor& t) {
  const int64_t c = t.size(-1);
  int64_t n = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) n *= t.size(i);
  auto rows = t.reshape({n, c});
  const bool row_major = rows.stride(1) == 1 && rows.stride(0) >= std::max<int64_t>(1, c);
  const bool column_major = rows.stride(0) == 1 && rows.stride(1) >= std::max<int64_t>(1, n);
  return row_major || column_major ? rows : rows.contiguous();
}

std::vector<int64_t> with_last(const at::Tensor& t, int64_t last) {
  auto sizes = t.sizes().vec();
  sizes.back() = last;
  return sizes;
}

// P[d, r] = dy^T h, summed over all rows in the accumulation dtype. 16-bit on the CPU: a block of rows at a time is
// widened, so that no float32 copy of dy ever exists.
at::Tensor outer_sum(const at::Tensor& dy, const at::Tensor& h) {
  const auto exact = accumulate_type(dy.scalar_type());
  if (exact == dy.scalar_type()) return at::mm(dy.t(), h);
  if (dy.is_cuda()) return at::mm(dy.t(), h, exact);
  constexpr int64_t kBlock = 512;
  auto P = at::zeros({dy.size(1), h.size(1)}, dy.options().dtype(exact));
  for (int64_t begin = 0; begin < dy.size(0); begin += kBlock) {
    const int64_t count = std::min(kBlock, dy.size(0) - begin);
    P.addmm_(dy.narrow(0, begin, count).to(exact).t(), h.narrow(0, begin, count).to(exact));
  }
  return P;
}

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
  auto h = at::mm(rows, V);
  const auto D = fold(U, S0, s, o);
  if (weight && x.dim() > 2 && !x.is_contiguous()) {
    // torch's own linear multiplies such an x matrix by matrix and rounds before it adds the bias. So that an adapter
    // of zeros gives its very bits, it comes first here; such an x is rare, and copied anyway.
    auto y = at::linear(x, *weight, bias).contiguous();
    y.view({rows.size(0), U.size(0)}).addmm_(h, D.t());
    return {y, h};
  }
  auto y = bias ? at::addmm(*bias, h, D.t()) : at::mm(h, D.t());
  if (weight) y.addmm_(rows, weight->t());
  return {y.view(with_last(x, U.size(0))), h};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward(const at::Tensor& dy, const at::Tensor& h,
                                                               const Optional& weight, const at::Tensor& U,
                                                               const at::Tensor& V, const at::Tensor& S0,
                                                               const at::Tensor& s, const at::Tensor& o, bool need_x,
                                                               bool need_s, bool need_o) {
  check_linear_backward(dy, h, weight, U, V, S0, s, o);
  const OperatorGuard guard(dy.device());
  const auto rows = as_rows(dy);
  auto dx = at::empty({0}, dy.options());
  if (need_x) {
    dx = at::mm(at::mm(rows, fold(U, S0, s, o)), V.t());
    if (weight) dx.addmm_(rows, *weight);
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
  m.impl("linear_backward", &linear_backward);
}

#ifdef OSORA_CUDA
TORCH_LIBRARY_IMPL(osora, CUDA, m) {
  m.impl("linear", &linear);
  m.impl("linear_backward", &linear_backward);
}
#endif

}  // namespace osora
