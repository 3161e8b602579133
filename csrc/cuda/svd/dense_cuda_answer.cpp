// SPDX-License-Identifier: Apache-2.0
// The factors as they are handed out, and how well they fit.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "core/svd_verdict.h"
#include "cuda/svd/dense_cuda.h"

namespace osora::cuda {
namespace {

constexpr double kLargestDefect = 1e-3;  // of U^T U and V^T V from the identity: far above rounding

}  // namespace

// W^T u in float64: [k, r]. The weight is widened some rows of W at a time; small ones, several at once.
DenseCuda::Array DenseCuda::residual_product(const Array& u) const {
  const Array exact = wide(u), made = array(k_, u.cols, Type::kFloat64);
  const int64_t row_bytes = 8 * weights_.rows;
  const int64_t rows = std::clamp<int64_t>(temporary_bytes_ / row_bytes, 1, d_);
  const int64_t matrices = rows < d_ ? 1 : std::max<int64_t>(1, temporary_bytes_ / (row_bytes * d_));
  for (int64_t b = 0, count = 0; b < batch(); b += count) {
    count = 1;
    while (count < matrices && b + count < batch() && positions_[b + count] == positions_[b] + count) ++count;
    for (int64_t row = 0; row < d_; row += rows) {
      const int64_t now = std::min(rows, d_ - row);
      const Array part = wide(slice(columns(weights_, row, now), positions_[b], count));
      Matrices few = slice(exact, b, count);
      few.data = static_cast<double*>(few.data) + row;
      gemm(*context_, {part}, {few}, slice(made, b, count), now, 1, row > 0);
    }
  }
  return made;
}

DenseCuda::Array DenseCuda::defect(const Array& a) const {
  const Array made = array(1, 1, Type::kFloat64);
  gram_defects(gram(a), made.as<double>(), stream());
  return made;
}

// The float64 product of all columns serves where a float32 one would be its own rounding as well.
DenseCuda::Certificate DenseCuda::certify(const Array& left, const Array& s, const Array& right, double) const {
  const int64_t r = left.cols;
  const Array order = array(1, r, Type::kInt32);
  largest_first(s.as<double>(), r, r, batch(), order.as<int>(), stream());
  Certificate made;
  made.u = array(left.rows, r, out_);
  made.v = array(right.rows, r, out_);
  made.s = array(1, r, out_);
  made.stored = array(1, r, Type::kFloat64);
  finish_triplets({left, right, s.as<double>(), order.as<int>(), exponents_.as<int>()}, made.u, made.v, made.s,
                  made.stored.as<double>(), stream());
  made.sizes = array(1, r, Type::kFloat64);
  residual_norms(residual_product(made.u), made.v, made.stored.as<double>(), made.sizes.as<double>(), stream());
  made.defect_u = defect(made.u);
  made.defect_v = defect(made.v);
  return made;
}

std::vector<core::Candidate<DenseCuda::Array>> DenseCuda::report(const Certificate& certificate, const Array& values,
                                                                 const Array* seen, double tol) const {
  const int64_t r = values.cols, width = kSizes + 2 * r;
  const Array packed = array(1, width, Type::kFloat64);
  pack_report({certificate.sizes.as<double>(), certificate.stored.as<double>(), values.as<double>(), r, batch(),
               certificate.defect_u.as<double>(), certificate.defect_v.as<double>(),
               seen ? seen->as<double>() : nullptr, failed_.as<int>(), exponents_.as<int>()},
              packed.as<double>(), stream());
  std::vector<double> numbers(batch() * width);
  read_back(*context_, numbers.data(), packed.data, numbers.size() * sizeof(double));

  std::vector<core::Candidate<Array>> candidates(batch());
  for (int64_t b = 0; b < batch(); ++b) {
    const double* const row = numbers.data() + b * width;
    const double* const stored = row + kSizes + r;
    if (std::isinf(stored[0])) {
      throw std::range_error("the largest singular value is beyond the range of float32");
    }
    const auto made = core::verdict(row + kSizes, stored, r, floor_, noise_, tol);
    auto& [found, missed] = candidates[b];
    const auto of_matrix = [&](const Array& a) {
      Array one = a;
      static_cast<Matrices&>(one) = slice(a, b, 1);
      return one;
    };
    found.u = of_matrix(certificate.u);
    found.s = of_matrix(certificate.s);
    found.v = of_matrix(certificate.v);
    const auto residuals = std::make_shared<std::vector<double>>(made.residuals);
    static_cast<Matrices&>(found.residuals) = {residuals->data(), Type::kFloat64, 1, r, 1, r};
    found.residuals.owner = std::shared_ptr<void>(residuals, residuals->data());
    found.floor = std::ldexp(made.floor, static_cast<int>(row[kExponent]));
    found.converged = made.certified && row[kFailed] == 0 && row[kDefect] <= kLargestDefect;
    found.can_be_finer = made.can_be_finer;
    missed = core::has_missed(row[kSeen], row[kSmallest], made.floor);
  }
  return candidates;
}

}  // namespace osora::cuda
