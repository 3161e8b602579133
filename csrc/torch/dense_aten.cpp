// SPDX-License-Identifier: Apache-2.0
#include "torch/dense_aten.h"

#include <ATen/ATen.h>  // it uses some forty operators

#include <cmath>
#include <limits>

#include "core/philox.h"

namespace osora {
namespace {

constexpr int64_t kProbes = 8;           // Gaussian vectors that look for a missed triplet
constexpr int64_t kProbeIterations = 4;  // power iterations they get

double epsilon(at::ScalarType type) { return type == at::kDouble ? 0x1p-52 : 0x1p-23; }

at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  if (a.size(0) == 1) return at::mm(a[0], b[0]).unsqueeze(0);  // bmm of one is slower than mm on the CPU
  return at::bmm(a, b);
}

// y^T y, summed in float64 whatever y is: [B, c, c].
at::Tensor gram_matrix(const at::Tensor& y) {
  const auto exact = y.to(at::kDouble);
  return product(exact.mT(), exact);
}

}  // namespace

DenseAten::DenseAten(const std::vector<at::Tensor>& weights, const core::SvdPlan& plan, at::ScalarType work,
                     at::ScalarType out, uint64_t seed, const std::vector<uint64_t>& keys)
    : plan_(plan), work_(work), out_(out), seed_(seed), keys_(keys) {
  const auto options = weights.front().options().dtype(work);
  auto stacked = at::empty({int64_t(weights.size()), weights.front().size(0), weights.front().size(1)}, options);
  for (size_t b = 0; b < weights.size(); ++b) {
    // A power of two changes no digit: 1e-30 and 1e+30 weights are decomposed like their scaled twins. Two factors,
    // since 2^-exponent itself may not fit the dtype.
    const auto [low, high] = at::aminmax(weights[b]);  // both are NaN if any entry is
    const double largest = std::max(-low.to(at::kDouble).item<double>(), high.to(at::kDouble).item<double>());
    TORCH_CHECK_VALUE(std::isfinite(largest), "osora::truncated_svd: a weight has NaN or infinite entries");
    int exponent = 0;
    if (largest > 0) std::frexp(largest, &exponent);
    exponents_.push_back(exponent);
    const int half = exponent / 2;
    auto target = stacked[int64_t(b)];
    target.copy_(weights[b]);
    target.mul_(std::ldexp(1.0, -half)).mul_(std::ldexp(1.0, -(exponent - half)));
  }
  a_ = plan.transposed ? stacked.mT() : stacked;
  frobenius_ = at::linalg_vector_norm(stacked, 2, at::IntArrayRef{1, 2}, true, at::kDouble);
  sigma_ = at::zeros({batch(), 1, 1}, options);
}

DenseAten::Array DenseAten::empty(int64_t rows, int64_t cols) const {
  return at::empty({batch(), rows, cols}, a_.options());
}

DenseAten::Array DenseAten::select(const Array& a, const std::vector<int64_t>& positions) const {
  return a.index_select(0, at::tensor(positions, at::kLong).to(a.device()));
}

void DenseAten::retain(const std::vector<int64_t>& positions) {
  std::vector<uint64_t> keys;
  std::vector<int> exponents;
  for (const int64_t b : positions) {
    keys.push_back(keys_[b]);
    exponents.push_back(exponents_[b]);
  }
  keys_ = std::move(keys);
  exponents_ = std::move(exponents);
  a_ = select(a_, positions);
  frobenius_ = select(frobenius_, positions);
  sigma_ = select(sigma_, positions);
}

void DenseAten::times(const Array& x, Array y) const {
  if (batch() == 1) {
    auto out = y[0];
    at::mm_out(out, a_[0], x[0]);
  } else {
    y.copy_(at::bmm(a_, x));
  }
}

DenseAten::Array DenseAten::transposed_times(const Array& y) const { return product(a_.mT(), y); }

void DenseAten::project_out(Array& z, const Array& v) const {
  if (v.size(2) == 0) return;
  const auto inside = product(v.mT(), z);
  if (z.size(0) == 1) {
    auto out = z[0];
    out.addmm_(v[0], inside[0], 1, -1);
  } else {
    z.baddbmm_(v, inside, 1, -1);
  }
}

void DenseAten::rotate(Array& v, const Array& q, int64_t width, int64_t keep) {
  const auto rotated = product(v.narrow(2, 0, width), q.narrow(2, 0, keep).to(v.scalar_type()));
  v.narrow(2, 0, keep).copy_(rotated);
}

DenseAten::Array DenseAten::gaussian(int64_t rows, int64_t cols) {
  auto host = at::empty({batch(), rows, cols}, at::TensorOptions().dtype(work_));
  for (int64_t b = 0; b < batch(); ++b) {
    if (work_ == at::kDouble) {
      core::fill_gaussian(host[b].mutable_data_ptr<double>(), rows * cols, seed_, keys_[b], draws_);
    } else {
      core::fill_gaussian(host[b].mutable_data_ptr<float>(), rows * cols, seed_, keys_[b], draws_);
    }
  }
  ++draws_;
  return host.to(a_.device());
}

DenseAten::Array DenseAten::column_norms(const Array& a) {
  return at::linalg_vector_norm(a, 2, at::IntArrayRef{1}, true);
}

// One round of Cholesky QR with the Gram matrix in float64, on columns scaled to length one. Returns the smallest
// diagonal entry of the factor, 1 for orthonormal columns: how well conditioned z was. Falls back to Householder QR
// where the columns are dependent to working precision.
double DenseAten::cholesky_round(Array& z) const {
  auto scaled = z / column_norms(z).clamp_min(std::numeric_limits<float>::min());
  auto [L, info] = at::linalg_cholesky_ex(gram_matrix(scaled));
  const double smallest = L.diagonal(0, 1, 2).min().item<double>();
  if (info.any().item<bool>() || !(smallest > 64 * epsilon(work_))) {
    z = std::get<0>(at::linalg_qr(z));
    return 0.0;
  }
  const auto identity = at::eye(z.size(2), L.options()).expand_as(L);
  const auto inverse = at::linalg_solve_triangular(L, identity, /*upper=*/false);
  z = product(scaled, inverse.mT().to(work_));
  return smallest;
}

// Replaces the columns marked in `bad` [B, 1, cols] by Gaussian ones.
void DenseAten::refill(Array& z, const Array& bad) {
  if (bad.any().item<bool>()) z = at::where(bad, gaussian(z.size(1), z.size(2)), z);
}

DenseAten::Array DenseAten::orthonormal_gaussian(int64_t rows, int64_t cols) {
  Array z = gaussian(rows, cols);
  cholesky_round(z);
  cholesky_round(z);
  return z;
}

void DenseAten::orthonormalise(Array& z, const Array& v, const Array& norms) {
  project_out(z, v);
  // 16 epsilon: a column at that level is rounding; ten times more stalls convergence, none at all keeps noise.
  const double level = 16 * epsilon(work_);
  const auto seen = at::maximum(sigma_, norms.amax(2, true).to(work_));
  const auto limit = level * seen * at::maximum(norms.to(work_), level * seen) + std::numeric_limits<float>::min();
  const auto length = column_norms(z);
  const auto bad = length.le(limit);
  z = z / length.clamp_min(std::numeric_limits<float>::min());
  refill(z, bad);
  for (int round = 0; round < 5; ++round) {
    project_out(z, v);
    if (cholesky_round(z) > 0.7 && round > 0) return;  // it met orthonormal columns: nothing left to mend
  }
}

std::pair<DenseAten::Array, DenseAten::Array> DenseAten::gram_eigen(const Array& y) {
  auto [lambda, q] = at::linalg_eigh(gram_matrix(y));
  lambda = lambda.flip({-1}).clamp_min(0);
  sigma_ = lambda.narrow(1, 0, 1).sqrt().unsqueeze(2).to(work_);
  return {lambda, q.flip({-1})};
}

DenseAten::Array DenseAten::largest_tails(const Array& q, int64_t block, int64_t rank) {
  if (rank <= block) return at::arange(block, q.options().dtype(at::kLong)).expand({q.size(0), block});
  const auto tails =
      at::linalg_vector_norm(q.narrow(1, q.size(1) - block, block).narrow(2, 0, rank), 2, at::IntArrayRef{1});
  return std::get<1>(tails.topk(block, 1));
}

DenseAten::Array DenseAten::ritz_residuals(const Array& v, const Array& y, const Array& lambda,
                                           const Array& which) const {
  const auto pick = [&](const Array& a) {
    return a.gather(2, which.unsqueeze(1).expand({a.size(0), a.size(1), which.size(1)}));
  };
  return transposed_times(pick(y)) - pick(v) * lambda.gather(1, which).unsqueeze(1).to(work_);
}

DenseAten::Array DenseAten::ritz_values(const Array& lambda, const Array& which) {
  return lambda.gather(1, which).sqrt().unsqueeze(1);
}

std::vector<double> DenseAten::relative_size(const Array& r, const Array& lambda, const Array& which,
                                             int64_t rank) const {
  const auto size = column_norms(r).squeeze(1).to(at::kDouble);
  const auto floor = (4 * epsilon(work_)) * frobenius_.squeeze(1);
  const auto noise = floor * at::maximum(lambda.gather(1, which).sqrt(), floor);
  const auto ignore = at::logical_or(size.le(noise), which.ge(rank));
  const auto relative = (size / lambda.gather(1, which).clamp_min(1e-300)).masked_fill(ignore, 0.0);
  const auto host = std::get<0>(relative.max(1)).to(at::kCPU).contiguous();
  return {host.const_data_ptr<double>(), host.const_data_ptr<double>() + host.numel()};
}

DenseAten DenseAten::one(int64_t b) const {
  DenseAten single = *this;
  if (batch() > 1) single.retain({b});
  return single;
}

DenseAten::Candidate DenseAten::triplets(int64_t b, const Array& v, double tol, bool with_probe) {
  DenseAten self = one(b);
  Array right = v.narrow(0, b, 1).clone(), left, s;
  int64_t passes = 0;
  // Rayleigh-Ritz on x with y = M x: rotates x to right vectors, gives the left ones and the values.
  const auto ritz = [&](Array& x, const Array& y) {
    const auto q = self.gram_eigen(y).second.to(work_);
    x = product(x, q);
    left = product(y, q);
    s = at::linalg_vector_norm(left, 2, at::IntArrayRef{1}, true, at::kDouble);
    left = left / s.clamp_min(1e-300).to(work_).clamp_min(std::numeric_limits<float>::min());
    // A singular value at the rounding level of A has no left vector of its own: any orthonormal one serves.
    self.refill(left, s.le(8 * epsilon(work_) * self.frobenius_));
    for (int round = 0; round < 4; ++round) {
      if (self.cholesky_round(left) > 0.999 && round > 0) break;
    }
  };
  self.cholesky_round(right);
  self.cholesky_round(right);
  Array y = self.empty(plan_.rows, right.size(2));
  self.times(right, y);
  ++passes;
  ritz(right, y);
  const Array inner = right, outer = left;  // singular vectors of A: short side, long side
  const double smallest = s.numel() ? s.min().item<double>() : 0.0;
  if (plan_.transposed) {
    // A = W^T, so A V = U S says W^T U = V S. One more half step gives W V = U S, the form the certificate is for.
    right = left.clone();
    const Array z = self.transposed_times(right);
    ++passes;
    ritz(right, z);
  }
  // Repeated values come out of the last step in any order.
  const auto order = std::get<1>(at::sort(s.squeeze(1), /*stable=*/true, /*dim=*/1, /*descending=*/true))[0];
  s = s.index_select(2, order);
  left = left.index_select(2, order);
  right = right.index_select(2, order);
  Candidate result{self.certify(0, left, s.squeeze(1), right, tol), {}};
  passes += 1;
  if (with_probe) {
    result.missed = self.probe(0, outer, inner, smallest, passes);
    if (result.missed.defined()) result.found.converged = false;
  }
  result.found.passes = passes;
  return result;
}

// Residuals of the factors as they will be handed out, rounded to `out_`: rho_i = |W^T u_i - sigma_i v_i| / sigma_i.
// A value at the rounding level of W is measured against sigma_1 instead. u, v: [1, *, r]; s: [1, r], scaled.
core::Found<DenseAten::Array> DenseAten::certify(int64_t b, Array u, Array s, Array v, double tol) const {
  core::Found<Array> found;
  if (s.numel() > 0) {
    const auto largest = u.gather(1, u.abs().argmax(1, true));
    const auto sign = at::where(largest.lt(0), -1.0, 1.0).to(u.scalar_type());
    u = (u * sign).to(out_);
    v = (v * sign).to(out_);
  }
  // Sigma as it will be stored: it may be subnormal there, or beyond the range.
  const int half = exponents_[b] / 2;
  found.s = (s[0] * std::ldexp(1.0, half) * std::ldexp(1.0, exponents_[b] - half)).to(out_);
  s = ((found.s.to(at::kDouble) * std::ldexp(1.0, -half)) * std::ldexp(1.0, half - exponents_[b])).unsqueeze(0);
  TORCH_CHECK_VALUE(s.isfinite().all().item<bool>(),
                    "osora::truncated_svd: the largest singular value is beyond the range of ", out_,
                    ": scale the weight down, or convert it to float64");
  const auto wide_s = s.to(at::kDouble).unsqueeze(1);
  const auto adjoint = (plan_.transposed ? a_ : a_.mT()).narrow(0, b, 1);  // W^T [1, k, d]
  const auto residual = product(adjoint, u.to(work_)) - v.to(work_) * s.to(work_).unsqueeze(1);
  auto size = at::linalg_vector_norm(residual, 2, at::IntArrayRef{1}, false, at::kDouble);  // [1, r]
  const auto norm = frobenius_.narrow(0, b, 1).squeeze(1);
  if (work_ != at::kDouble) {
    // What is this small is made of the product's own rounding: again in float64, some rows of W^T at a time.
    const auto small = size[0].lt((64 * epsilon(work_)) * norm[0]).nonzero().squeeze(1);
    if (small.numel() > 0) {
      const auto few_u = u[0].index_select(1, small).to(at::kDouble);
      const auto few_v = v[0].index_select(1, small).to(at::kDouble) * wide_s[0].index_select(1, small);
      auto squares = at::zeros({small.numel()}, size.options());
      constexpr int64_t kRows = 512;
      for (int64_t begin = 0; begin < adjoint.size(1); begin += kRows) {
        const int64_t count = std::min(kRows, adjoint.size(1) - begin);
        const auto part = at::mm(adjoint[0].narrow(0, begin, count).to(at::kDouble), few_u);
        squares += (part - few_v.narrow(0, begin, count)).square().sum(0);
      }
      size[0].index_put_({small}, squares.sqrt());
    }
  }
  const auto wide = s.to(at::kDouble);
  const auto reliable = wide.gt((8 * epsilon(out_)) * norm);
  const auto reference = at::where(reliable, wide, wide.amax(1, true)).clamp_min(1e-300);
  found.residuals = (size / reference)[0];
  found.converged = found.residuals.numel() == 0 || found.residuals.max().item<double>() <= tol;
  found.u = u[0];
  found.v = v[0];
  return found;
}

// A few power iterations on (I - U U^T) A from Gaussian vectors: what they see above sigma_r was missed. A lower
// bound on |(I - U U^T) A|, so it never accuses a right answer.
DenseAten::Array DenseAten::probe(int64_t b, const Array& u, const Array& v, double smallest, int64_t& passes) {
  const int64_t count = std::min(kProbes, plan_.cols - v.size(2));
  if (count <= 0) return {};
  DenseAten self = one(b);
  self.draws_ = 1u << 31;  // streams of its own
  Array x = self.gaussian(plan_.cols, count);
  const auto orthonormalise_x = [&] {
    self.project_out(x, v);
    self.refill(x, column_norms(x).le(std::numeric_limits<float>::min()));
    self.cholesky_round(x);
    self.project_out(x, v);
    self.cholesky_round(x);
  };
  orthonormalise_x();
  double seen = 0;
  for (int64_t iteration = 0; iteration < kProbeIterations; ++iteration) {
    Array y = self.empty(plan_.rows, count);
    self.times(x, y);
    self.project_out(y, u);
    seen = std::sqrt(std::get<0>(at::linalg_eigh(gram_matrix(y))).max().clamp_min(0).item<double>());
    x = self.transposed_times(y);
    orthonormalise_x();
    passes += 2;
  }
  const double noise = 64 * epsilon(work_) * frobenius_[b].item<double>();
  return seen > smallest * (1 + 1e-3) + noise ? x[0] : Array{};
}

void DenseAten::insert_probe(Array& r, int64_t b, const Array& missed) const {
  if (missed.defined()) r[b].narrow(1, 0, std::min(missed.size(1), r.size(2))).copy_(missed);
}

core::Found<DenseAten::Array> DenseAten::gram(int64_t b, double tol) {
  const auto a = a_.narrow(0, b, 1);
  const auto vectors = std::get<1>(at::linalg_eigh(product(a.mT(), a))).flip({-1});
  return one(b).triplets(0, vectors.narrow(2, 0, plan_.rank), tol, /*with_probe=*/false).found;
}

core::Found<DenseAten::Array> DenseAten::full(int64_t b, double tol) {
  auto [u, s, vh] = at::linalg_svd(a_[b], /*full_matrices=*/false);
  auto left = u.narrow(1, 0, plan_.rank).unsqueeze(0), right = vh.mT().narrow(1, 0, plan_.rank).unsqueeze(0);
  if (plan_.transposed) std::swap(left, right);
  auto found = certify(b, left, s.narrow(0, 0, plan_.rank).unsqueeze(0).to(at::kDouble), right, tol);
  found.passes = 1;
  return found;
}

}  // namespace osora
