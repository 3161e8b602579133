// SPDX-License-Identifier: Apache-2.0
// The factors as they are handed out, and how well they fit.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>

#include <cmath>

#include "core/svd_verdict.h"
#include "torch/svd/dense_aten.h"
#include "torch/svd/scale.h"

namespace osora {
namespace {

// s [r], float64, of a matrix scaled by 2^-exponent -> out = s 2^exponent in its own dtype, where it may be subnormal
// or beyond the range; and that number, scaled.
at::Tensor round_values(const at::Tensor& s, int exponent, at::Tensor out) {
  out.copy_(scale_by(s.clone(), exponent));
  auto stored = scale_by(out.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true), -exponent);
  TORCH_CHECK_VALUE(stored.isfinite().all().item<bool>(), "osora::truncated_svd: the largest singular value is beyond ",
                    "the range of ", out.scalar_type(), ": scale the weight down",
                    out.scalar_type() == at::kDouble ? "" : ", or convert it to float64");
  return stored;
}

}  // namespace

// Measured on the factors as they will be handed out, rounded to `out_`.
DenseAten::Certificate DenseAten::certify(Array u, Array s, Array v, double tol) const {
  // Repeated values come out of Rayleigh-Ritz in any order.
  const auto order = std::get<1>(at::sort(s, /*stable=*/true, /*dim=*/2, /*descending=*/true));
  s = s.gather(2, order).squeeze(1);
  const auto sorted = [&](const Array& a) { return a.gather(2, order.expand({a.size(0), a.size(1), order.size(2)})); };
  u = sorted(u);
  v = sorted(v);
  const auto sign = at::where(u.gather(1, u.abs().argmax(1, true)).lt(0), -1.0, 1.0).to(u.scalar_type());
  Certificate made{(u * sign).to(out_), at::empty(s.sizes(), s.options().dtype(out_)), (v * sign).to(out_),
                   at::empty(s.sizes(), s.options()), at::empty(s.sizes(), s.options())};
  for (int64_t b = 0; b < batch(); ++b) {
    auto stored = round_values(s[b], weights_[b]->exponent(), made.s[b]);
    const auto residual = weights_[b]->transposed_times(made.u[b].to(work_)) - made.v[b].to(work_) * stored.to(work_);
    auto size = at::linalg_vector_norm(residual, 2, at::IntArrayRef{0}, false, at::kDouble);  // [r]
    const auto largest = stored.amax(0, true);
    if (work_ != at::kDouble) {
      // The product's own rounding is at most some 16 epsilon |W|. Where that is as large as the tolerance, again in
      // float64; elsewhere it is a small part of a residual that is far from the verdict. Noise is measured as it is.
      const auto norm = epsilon(work_) * frobenius_[b][0], reference = at::maximum(stored, floor_ * largest);
      const auto near =
          reference.lt((16 / tol) * norm).logical_and_(size.lt(64 * norm)).logical_and_(stored.gt(noise_ * largest));
      const auto small = near.nonzero().squeeze(1);
      if (small.numel() > 0) {
        const auto few_u = made.u[b].index_select(1, small).to(at::kDouble);
        const auto few_v = made.v[b].index_select(1, small).to(at::kDouble);
        const auto product = weights_[b]->in(at::kDouble).transposed_times(few_u);
        // v^T W^T u is sigma to the second order of the vectors' errors; |A v| has those of its own product.
        const auto old = s[b].index_select(0, small), refined = (product * few_v).sum(0);
        s[b].index_put_({small}, at::where((refined - old).abs().le(noise_ * largest), refined, old));
        stored = round_values(s[b], weights_[b]->exponent(), made.s[b]);
        size.index_put_({small},
                        at::linalg_vector_norm(product - few_v * stored.index_select(0, small), 2, at::IntArrayRef{0}));
        const auto order = std::get<1>(at::sort(stored, /*stable=*/true, /*dim=*/0, /*descending=*/true));
        for (const auto& part : {made.u[b], made.v[b]}) part.copy_(part.index_select(1, order));
        made.s[b].copy_(made.s[b].index_select(0, order));
        stored = stored.index_select(0, order);
        size = size.index_select(0, order);
      }
    }
    if (out_ == at::kDouble) {
      // Nothing is wider than these factors: W v = u s holds no better than the eigenvectors of y^T y, which squares
      // the condition. So it is measured too.
      auto left = at::empty(made.u[b].sizes(), options_);
      weights_[b]->times(made.v[b], left);
      size = at::maximum(size, at::linalg_vector_norm(left - made.u[b] * stored, 2, at::IntArrayRef{0}));
    }
    made.stored[b].copy_(stored);
    made.sizes[b].copy_(size);
  }
  return made;
}

std::vector<core::Candidate<DenseAten::Array>> DenseAten::report(const Certificate& certificate, const Array& values,
                                                                 const Array* seen, double tol) const {
  std::vector<core::Candidate<Array>> candidates(batch());
  const auto stored = certificate.stored.to(at::kCPU), sizes = certificate.sizes.to(at::kCPU);
  for (int64_t b = 0; b < batch(); ++b) {
    const int64_t r = stored.size(1);
    const auto made = core::verdict(sizes.const_data_ptr<double>() + b * r, stored.const_data_ptr<double>() + b * r, r,
                                    floor_, noise_, tol);
    auto& [found, missed] = candidates[b];
    found.u = certificate.u[b];
    found.s = certificate.s[b];
    found.v = certificate.v[b];
    found.residuals = at::tensor(made.residuals, stored.options());
    found.floor = std::ldexp(made.floor, weights_[b]->exponent());
    found.converged = made.certified;
    found.can_be_finer = made.can_be_finer;
    if (seen) missed = core::has_missed((*seen)[b].item<double>(), values[b].min().item<double>(), made.floor);
  }
  return candidates;
}

std::vector<core::Candidate<DenseAten::Array>> DenseAten::full(double tol) const {
  std::vector<Array> left, values, right;
  for (const auto& weight : weights_) {
    const auto [u, s, vh] = at::linalg_svd(weight->whole(), /*full_matrices=*/false);
    left.push_back(u.narrow(1, 0, plan_.rank));
    values.push_back(s.narrow(0, 0, plan_.rank).to(at::kDouble).unsqueeze(0));
    right.push_back(vh.mT().narrow(1, 0, plan_.rank));
  }
  const auto s = at::stack(values);
  auto candidates = report(certify(at::stack(left), s, at::stack(right), tol), s, nullptr, tol);
  for (auto& candidate : candidates) {
    candidate.found.passes = 1;
    candidate.found.columns = plan_.rank;
  }
  return candidates;
}

}  // namespace osora
