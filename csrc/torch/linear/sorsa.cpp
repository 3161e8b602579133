// SPDX-License-Identifier: Apache-2.0
// SORSA's linear operator and its gradient (docs/method.md, "SORSA"). The products are ATen's, the reduction of ds is
// that of the fold; one source serves CPU and CUDA. No matrix [d, k] is made beside the weight.
#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "torch/common/guards.h"
#include "torch/fold/fold.h"
#include "torch/linear/checks_sorsa.h"
#include "torch/linear/linear.h"
#include "torch/linear/products.h"
#include "torch/linear/rows.h"

namespace osora {
namespace {

using Optional = std::optional<at::Tensor>;

// [A | B] [d, 2r] in U0's dtype: A = u S + U0 s, which is zero at the start whatever U0 and S0 are, and B = U S.
at::Tensor fold_sorsa(const at::Tensor& U0, const at::Tensor& S0, const at::Tensor& u, const at::Tensor& s) {
  const auto exact = accumulate_type(U0.scalar_type());
  const auto ds = s.to(exact), S = at::add(S0, ds), frozen = U0.to(exact), moved = at::mul(u.to(exact), S);
  auto both = at::empty({U0.size(0), 2 * U0.size(1)}, U0.options().memory_format(at::MemoryFormat::Contiguous));
  both.narrow(1, 0, U0.size(1)).copy_(at::addcmul(moved, frozen, ds));
  both.narrow(1, U0.size(1), U0.size(1)).copy_(at::addcmul(moved, frozen, S));
  return both;
}

// [V0 | v] [k, 2r] in V0's dtype.
at::Tensor beside(const at::Tensor& V0, const at::Tensor& v) { return at::cat({V0, v.to(V0.scalar_type())}, 1); }

std::tuple<at::Tensor, at::Tensor> sorsa_linear(const at::Tensor& x, const Optional& weight, const Optional& bias,
                                                const at::Tensor& U0, const at::Tensor& S0, const at::Tensor& V0,
                                                const at::Tensor& u, const at::Tensor& s, const at::Tensor& v) {
  check_sorsa_linear(x, weight, bias, U0, S0, V0, u, s, v);
  const OperatorGuard guard(x.device());
  const int64_t r = U0.size(1);
  const auto rows = as_rows(x);
  const auto both = down_product(rows, beside(V0, v));
  return {linear_plus(x, rows, weight, bias, both, fold_sorsa(U0, S0, u, s)),
          at::add(both.narrow(1, 0, r), both.narrow(1, r, r))};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> sorsa_linear_backward(
    const at::Tensor& dy, const Optional& x, const Optional& h, const Optional& weight, const at::Tensor& U0,
    const at::Tensor& S0, const at::Tensor& V0, const at::Tensor& u, const at::Tensor& s, const at::Tensor& v,
    bool need_x, bool need_u, bool need_s, bool need_v) {
  check_sorsa_backward(dy, x, h, weight, U0, S0, V0, u, s, v, need_u || need_s, need_v);
  const OperatorGuard guard(dy.device());
  const int64_t r = U0.size(1);
  const auto exact = accumulate_type(U0.scalar_type());
  const auto rows = as_rows(dy);
  const auto sums = dy.options().dtype(exact);
  auto dx = at::empty({0}, dy.options());
  auto du = at::empty({0}, sums), ds = at::empty({0}, sums), dv = at::empty({0}, sums);
  if (need_x || need_v) {
    const auto g = at::mm(rows, fold_sorsa(U0, S0, u, s));  // dy [A | B]
    if (need_x) {
      dx = at::mm(g, beside(V0, v).t());
      if (weight) dx.addmm_(rows, *weight);
      dx = dx.view(with_last(dy, V0.size(0)));
    }
    if (need_v) dv = outer_sum(as_rows(*x), g.narrow(1, r, r));
  }
  if (need_u || need_s) {
    auto P = outer_sum(rows, *h);  // of U S
    if (need_s) {
      // Sum over i of U P: the fold's own reduction, in its fixed order, with output scales of one.
      const auto U = at::add(U0.to(exact), u.to(exact));
      ds = std::get<0>(fold_backward(U, P, S0, s.to(exact), at::zeros({U.size(0)}, sums), true, false));
    }
    if (need_u) du = P.mul_(at::add(S0, s.to(exact)));
  }
  return {dx, du, ds, dv};
}

}  // namespace

TORCH_LIBRARY_IMPL(osora, CPU, m) {
  m.impl("sorsa_linear", &sorsa_linear);
  m.impl("sorsa_linear_backward", &sorsa_linear_backward);
}

#ifdef OSORA_CUDA
TORCH_LIBRARY_IMPL(osora, CUDA, m) {
  m.impl("sorsa_linear", &sorsa_linear);
  m.impl("sorsa_linear_backward", &sorsa_linear_backward);
}
#endif

}  // namespace osora
