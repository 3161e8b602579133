// SPDX-License-Identifier: Apache-2.0
#include "torch/svd/dense_aten.h"

#include <ATen/ATen.h>  // it uses some forty operators

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/orthonormalise.h"
#include "core/philox.h"
#include "core/svd_verdict.h"
#include "torch/common/numbers.h"
#include "torch/svd/rounding.h"
#include "torch/svd/scale.h"

namespace osora {
namespace {

at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  const bool one = a.size(0) == 1;  // bmm of one is slower than mm on the CPU
  auto made = one ? at::mm(a[0], b[0]).unsqueeze(0) : at::bmm(a, b);
  rounded(made, a, b);
  return made;
}

// y^T y, summed in float64 whatever y is: [B, c, c].
at::Tensor gram_matrix(const at::Tensor& y) {
  constexpr int64_t kRows = 1024;
  if (y.size(0) > 1 || y.size(1) * y.size(2) <= (1 << 17)) {
    const auto exact = y.to(at::kDouble);
    return product(exact.mT(), exact);
  }
  // In the cache, without a wide copy of y, and of the symmetric product only what lies on or below its diagonal.
  constexpr int64_t kTile = 96;
  const int64_t n = y.size(2);
  auto g = at::empty({n, n}, y.options().dtype(at::kDouble));
  for (int64_t begin = 0; begin < y.size(1); begin += kRows) {
    const auto exact = y[0].narrow(0, begin, std::min(kRows, y.size(1) - begin)).to(at::kDouble);
    for (int64_t top = 0; top < n; top += kTile) {
      const int64_t height = std::min(kTile, n - top);
      auto part = g.narrow(0, top, height).narrow(1, 0, top + height);
      at::addmm_out(part, part, exact.narrow(1, top, height).t(), exact.narrow(1, 0, top + height), begin > 0 ? 1 : 0);
    }
  }
  for (int64_t top = kTile; top < n; top += kTile) {
    const auto left = g.narrow(0, top, std::min(kTile, n - top)).narrow(1, 0, top);
    g.narrow(0, 0, top).narrow(1, top, left.size(0)).copy_(left.t());
  }
  rounded(g, y[0].t(), y[0]);
  return g.unsqueeze(0);
}

constexpr int64_t kNarrow = 128;

// Lengths of the columns of a row-major block: a row at a time, which a general reduction over rows is slow at.
template <class T>
void narrow_norms(const T* a, int64_t rows, int64_t cols, int64_t stride, T* norms) {
  double sums[kNarrow] = {};
  for (int64_t i = 0; i < rows; ++i, a += stride) {
    for (int64_t j = 0; j < cols; ++j) sums[j] += double(a[j]) * double(a[j]);
  }
  for (int64_t j = 0; j < cols; ++j) norms[j] = T(std::sqrt(sums[j]));
}

}  // namespace

DenseAten::DenseAten(const std::vector<Panels>& weights, const core::SvdPlan& plan, const at::TensorOptions& work,
                     at::ScalarType out, uint64_t seed, const std::vector<uint64_t>& keys)
    : plan_(plan),
      options_(work),
      work_(work.dtype().toScalarType()),
      out_(out),
      floor_(core::rounding_floor(plan.rows, plan.cols, epsilon(out))),
      noise_(core::rounding_noise(plan.rows, plan.cols, epsilon(out))),
      seed_(seed),
      keys_(keys),
      frobenius_(at::empty({int64_t(weights.size()), 1, 1}, at::TensorOptions().dtype(at::kDouble))) {
  for (const auto& weight : weights) {
    frobenius_[int64_t(weights_.size())].fill_(weight.frobenius());
    weights_.push_back(std::make_shared<const Panels>(weight.in(work_)));
  }
  frobenius_ = frobenius_.to(options_.device());
  sigma_ = at::zeros({batch(), 1, 1}, options_);
}

DenseAten::Array DenseAten::empty(int64_t rows, int64_t cols) const {
  return at::empty({batch(), rows, cols}, options_);
}

DenseAten::Array DenseAten::select(const Array& a, const std::vector<int64_t>& positions) {
  return a.index_select(0, at::tensor(positions, at::kLong).to(a.device()));
}

DenseAten DenseAten::only(const std::vector<int64_t>& positions) const {
  DenseAten some = *this;
  some.keys_.clear();
  some.weights_.clear();
  for (const int64_t b : positions) {
    some.keys_.push_back(keys_[b]);
    some.weights_.push_back(weights_[b]);
  }
  some.frobenius_ = select(frobenius_, positions);
  some.sigma_ = select(sigma_, positions);
  return some;
}

void DenseAten::times(const Array& x, Array y) const {
  for (int64_t b = 0; b < batch(); ++b) {
    if (plan_.transposed) {
      y[b].copy_(weights_[b]->transposed_times(x[b]));
    } else {
      weights_[b]->times(x[b], y[b]);
    }
  }
}

DenseAten::Array DenseAten::transposed_times(const Array& y) const {
  if (!plan_.transposed && batch() == 1) return weights_[0]->transposed_times(y[0]).unsqueeze(0);
  Array z = empty(plan_.cols, y.size(2));
  for (int64_t b = 0; b < batch(); ++b) {
    if (plan_.transposed) {
      weights_[b]->times(y[b], z[b]);
    } else {
      z[b].copy_(weights_[b]->transposed_times(y[b]));
    }
  }
  return z;
}

std::pair<DenseAten::Array, DenseAten::Array> DenseAten::times_and_back(const Array& x, Array y, const Array&) const {
  if (!plan_.transposed && batch() == 1) {
    const Array back = weights_[0]->times_and_back(x[0], y[0]).unsqueeze(0);
    return {back, column_norms(y)};
  }
  times(x, y);
  return {transposed_times(y), column_norms(y)};
}

DenseAten::Array DenseAten::product(const Array& a, const Array& q) const { return osora::product(a, q.to(work_)); }

void DenseAten::project_out(Array& z, const Array& v) const {
  if (v.size(2) == 0) return;
  const auto inside = osora::product(v.mT(), z);
  if (z.size(0) == 1) {
    auto out = z[0];
    out.addmm_(v[0], inside[0], 1, -1);
  } else {
    z.baddbmm_(v, inside, 1, -1);
  }
  rounded(z, v, inside);
}

void DenseAten::rotate(Array& v, Array& y, const Array& q, int64_t width, int64_t keep) {
  const auto factor = q.narrow(2, 0, keep).to(v.scalar_type());
  for (auto* const a : {&v, &y}) a->narrow(2, 0, keep).copy_(osora::product(a->narrow(2, 0, width), factor));
}

DenseAten::Array DenseAten::gaussian(int64_t rows, int64_t cols) {
  auto host = at::empty({batch(), rows, cols}, at::TensorOptions().dtype(work_));
  for (int64_t b = 0; b < batch(); ++b) {
    with_wide_number(work_, [&](auto number) {
      core::fill_gaussian(host[b].mutable_data_ptr<decltype(number)>(), rows * cols, seed_, keys_[b], draws_);
    });
  }
  ++draws_;
  return host.to(options_.device());
}

DenseAten::Array DenseAten::column_norms(const Array& a) {
  if (!a.is_cpu() || a.stride(2) != 1 || a.size(2) > kNarrow) {
    return at::linalg_vector_norm(a, 2, at::IntArrayRef{1}, true);
  }
  auto norms = at::empty({a.size(0), 1, a.size(2)}, a.options());
  with_wide_number(a.scalar_type(), [&](auto number) {
    using T = decltype(number);
    for (int64_t b = 0; b < a.size(0); ++b) {
      narrow_norms(a.const_data_ptr<T>() + b * a.stride(0), a.size(1), a.size(2), a.stride(1),
                   norms[b].mutable_data_ptr<T>());
    }
  });
  return norms;
}

// One round of Cholesky QR with the Gram matrix in float64, on columns scaled to length one. Returns the smallest
// diagonal entry of the factor of z itself, 1 for orthonormal columns: how well conditioned z was and, where z was
// orthonormal before it was projected, how much of it the projection has left. Falls back to Householder QR where the
// columns are dependent to working precision.
double DenseAten::cholesky_qr(Array& z) const {
  const auto lengths = column_norms(z).clamp_min(std::numeric_limits<float>::min());
  auto scaled = z / lengths;
  auto [L, info] = at::linalg_cholesky_ex(gram_matrix(scaled));
  const auto pivots = L.diagonal(0, 1, 2);
  if (info.any().item<bool>() || !(pivots.min().item<double>() > 64 * epsilon(work_))) {
    z = std::get<0>(at::linalg_qr(z));
    return 0.0;
  }
  const auto identity = at::eye(z.size(2), L.options()).expand_as(L);
  const auto inverse = at::linalg_solve_triangular(L, identity, /*upper=*/false);
  z = osora::product(scaled, inverse.mT().to(work_));
  return (pivots * lengths.squeeze(1)).min().item<double>();
}

// Replaces the columns marked in `bad` [B, 1, cols] by Gaussian ones.
void DenseAten::refill(Array& z, const Array& bad) {
  if (bad.any().item<bool>()) z = at::where(bad, gaussian(z.size(1), z.size(2)), z);
}

DenseAten::Array DenseAten::orthonormal_gaussian() {
  Array z = gaussian(plan_.cols, plan_.block);
  cholesky_qr(z);
  cholesky_qr(z);
  return z;
}

DenseAten::Array DenseAten::probe_gaussian(int64_t count, int64_t turn) {
  draws_ = core::probe_stream(turn);
  return gaussian(plan_.cols, count);
}

DenseAten::Array DenseAten::zero_norms(int64_t count) const { return at::zeros({batch(), 1, count}, options_); }

void DenseAten::drop_noise(Array& z, const Array& norms) {
  // 16 epsilon: a column at that level is rounding; ten times more stalls convergence, none at all keeps noise.
  const double level = 16 * epsilon(work_);
  // Of all blocks so far, since a block of noise has norms of noise alone.
  sigma_ = at::maximum(sigma_, norms.amax(2, true).to(work_));
  const auto seen = sigma_;
  const auto limit = level * seen * at::maximum(norms.to(work_), level * seen) + std::numeric_limits<float>::min();
  const auto length = column_norms(z);
  const auto bad = length.le(limit);
  z = z / length.clamp_min(std::numeric_limits<float>::min());
  refill(z, bad);
}

void DenseAten::orthonormalise(Array& z, const Array& v, const Array& norms) {
  core::orthonormalise_in_rounds(*this, z, v, norms);
}

DenseAten::Array DenseAten::take_lengths(Array& left) {
  const auto s = at::linalg_vector_norm(left, 2, at::IntArrayRef{1}, true, at::kDouble);
  left = left / s.clamp_min(1e-300).to(work_).clamp_min(std::numeric_limits<float>::min());
  refill(left, s.le(8 * epsilon(work_) * frobenius_));
  return s;
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

DenseAten::Array DenseAten::ritz_residuals(const Array& v, const Array& y, const Array& lambda, const Array& which,
                                           const Array&) const {
  const auto pick = [&](const Array& a) {
    return a.gather(2, which.unsqueeze(1).expand({a.size(0), a.size(1), which.size(1)}));
  };
  return transposed_times(pick(y)) - pick(v) * lambda.gather(1, which).unsqueeze(1).to(work_);
}

DenseAten::Array DenseAten::ritz_values(const Array& lambda, const Array& which) {
  return lambda.gather(1, which).sqrt().unsqueeze(1);
}

std::vector<double> DenseAten::relative_size(const Array& r, const Array& lambda, const Array& which) const {
  const auto size = column_norms(r).squeeze(1).to(at::kDouble);
  const auto value = lambda.gather(1, which).sqrt(), largest = lambda.narrow(1, 0, 1).sqrt();
  const auto noise = (4 * epsilon(work_)) * frobenius_.squeeze(1);
  const auto ignore = at::logical_or(size.le(noise * at::maximum(value, noise)), which.ge(plan_.rank));
  const auto relative =
      (size / (value * at::maximum(value, floor_ * largest)).clamp_min(1e-300)).masked_fill(ignore, 0);
  const auto host = std::get<0>(relative.max(1)).to(at::kCPU).contiguous();
  return {host.const_data_ptr<double>(), host.const_data_ptr<double>() + host.numel()};
}

DenseAten::Array DenseAten::largest_value(const Array& y) {
  return at::linalg_eigvalsh(gram_matrix(y)).amax(1).clamp_min(0).sqrt();
}

void DenseAten::insert(Array& r, int64_t b, const Array& x, int64_t i) {
  const int64_t count = std::min(x.size(2), r.size(2));
  r[b].narrow(1, 0, count).copy_(x[i].narrow(1, 0, count));
}

DenseAten::Array DenseAten::gram_vectors() const {
  std::vector<Array> found;
  for (const auto& weight : weights_) {
    const auto vectors = std::get<1>(at::linalg_eigh(weight->gram(/*of_rows=*/plan_.transposed)));
    found.push_back(vectors.narrow(1, plan_.cols - plan_.rank, plan_.rank).flip({1}));
  }
  return at::stack(found);
}

DenseAten::Array DenseAten::subspace_iteration(int64_t passes) {
  const auto orthonormal = [](const Array& a) { return std::get<0>(at::linalg_qr(a)); };
  Array v = gaussian(plan_.cols, plan_.rank);
  for (int64_t i = 0; i <= passes; ++i) {
    Array y = empty(plan_.rows, plan_.rank);
    times(v, y);
    v = orthonormal(transposed_times(orthonormal(y)));
  }
  return v;
}

}  // namespace osora
