// SPDX-License-Identifier: Apache-2.0
// Orthonormal columns and Rayleigh-Ritz.
#include <algorithm>
#include <cmath>

#include "core/orthonormalise.h"
#include "cuda/svd/dense_cuda.h"

namespace osora::cuda {
namespace {

// On the diagonal of a Gram matrix of unit columns, summed in float64: above what its sum and its factorisation lose,
// so that dependent columns get a small pivot and not a failure.
double shift(int64_t cols) { return 1e-13 + static_cast<double>(cols) * 0x1p-52; }

// Of a Gram matrix. XsyevBatched is published to win up to some 1500 (docs/cuda.md); beyond, Xsyevd one by one.
constexpr int64_t kLargestBatchedEigen = 1536;

// A pivot at the rounding level leaves a column of noise, which the next round must find replaced by a random one.
double least_pivot(double epsilon) { return std::max(64 * epsilon, 1e-6); }

}  // namespace

DenseCuda::Array DenseCuda::orthonormal_gaussian() {
  Array z = empty(plan_.cols, plan_.block);
  fill_normal(z, random(), stream());
  cholesky_qr(z);
  cholesky_qr(z);
  return z;
}

DenseCuda::Array DenseCuda::probe_gaussian(int64_t count, int64_t turn) {
  draws_ = core::probe_stream(turn);
  const Array x = empty(plan_.cols, count);
  fill_normal(x, random(), stream());
  return x;
}

DenseCuda::Array DenseCuda::zero_norms(int64_t count) const {
  const Array zeros = array(1, count, Type::kFloat64);
  check(cudaMemsetAsync(zeros.data, 0, static_cast<size_t>(batch() * count) * sizeof(double), stream()),
        "cudaMemsetAsync");
  return zeros;
}

DenseCuda::Array DenseCuda::column_norms(const Array& a) const {
  const Array norms = array(1, a.cols, Type::kFloat64);
  cuda::column_norms(a, norms.as<double>(), stream());
  return norms;
}

Noise DenseCuda::noise(const Array& norms) {
  // Until Rayleigh-Ritz tells sigma_1: of all blocks so far, since a block of noise has norms of noise alone.
  if (!ritz_) raise_to_largest(norms.as<double>(), norms.cols, batch(), sigma_.as<double>(), stream());
  // 16 epsilon: a column at that level is rounding; ten times more stalls convergence, none at all keeps noise.
  return {16 * epsilon(), sigma_.as<double>(), norms.as<double>()};
}

void DenseCuda::drop_noise(const Array& z, const Array& norms) {
  unit_columns(z, noise(norms), random(), nullptr, stream());
}

// The second round finds how well conditioned its input was, and the third is made of kernels that leave the matrices
// alone that have no need of it: the host does not wait to know.
void DenseCuda::orthonormalise(Array& z, const Array& v, const Array& norms) {
  if (z.cols > kMostColumns) return core::orthonormalise_in_rounds(*this, z, v, norms);
  const Array again = array(1, 1, Type::kInt32);
  int* const wanted = again.as<int>();
  project_out(z, v);
  cholesky_round(z, noise(norms), nullptr, nullptr);
  project_out(z, v);
  cholesky_round(z, {}, nullptr, wanted);
  const Array inside = array(v.cols * z.cols, row_strips(z.rows), Type::kFloat64);
  inner_parts(v, z, wanted, inside.as<double>(), stream());
  subtract_inside(v, inside.as<double>(), wanted, z, stream());
  cholesky_round(z, {}, wanted, nullptr);
}

void DenseCuda::cholesky_round(const Array& z, const Noise& noise, const int* wanted, int* again) {
  const Array parts = array(z.cols * z.cols, row_strips(z.rows), Type::kFloat64);
  gram_parts(z, wanted, parts.as<double>(), stream());
  solve_strips(z, parts.as<double>(), {noise, random(), shift(z.cols), least_pivot(epsilon()), wanted, again},
               stream());
}

// The condition is not measured: that would wait for the device. All rounds are made.
double DenseCuda::cholesky_qr(Array& z) {
  if (z.cols > kMostColumns) {
    cholesky_qr_by_libraries(z);
  } else {
    cholesky_round(z, {}, nullptr, nullptr);
  }
  return 0;
}

void DenseCuda::cholesky_qr_by_libraries(Array& z) {
  const int64_t n = z.cols;
  unit_columns(z, {}, random(), nullptr, stream());
  const Array factor = gram(z), inverse = array(n, n, Type::kFloat64), scaled = empty(n, n);
  const Array info = array(1, 1, Type::kInt32), addresses = array(1, 2, Type::kInt64);
  void** const factors = addresses.as<void*>();
  void** const inverses = factors + batch();
  shift_gram(factor, shift(n), inverse, stream());
  matrix_addresses(factor, factors, stream());
  matrix_addresses(inverse, inverses, stream());
  const int size = static_cast<int>(n), count = static_cast<int>(batch());
  check(cusolverDnDpotrfBatched(context_->solver, CUBLAS_FILL_MODE_LOWER, size, reinterpret_cast<double**>(factors),
                                size, info.as<int>(), count),
        "cusolverDnDpotrfBatched");
  const double one = 1;
  check(cublasDtrsmBatched(context_->blas, CUBLAS_SIDE_LEFT, CUBLAS_FILL_MODE_LOWER, CUBLAS_OP_N, CUBLAS_DIAG_NON_UNIT,
                           size, size, &one, reinterpret_cast<double**>(factors), size,
                           reinterpret_cast<double**>(inverses), size, count),
        "cublasDtrsmBatched");
  usable_inverse(factor, inverse, info.as<int>(), least_pivot(epsilon()), failed_.as<int>(), scaled, stream());
  const Array made = empty(z.rows, n);
  // Orthonormal columns come out as they were: the shift has made the factor longer by this.
  gemm(*context_, {z}, {scaled, true}, made, n, std::sqrt(1 + shift(n)));
  z = made;
}

DenseCuda::Array DenseCuda::take_lengths(const Array& a) {
  const Array lengths = array(1, a.cols, Type::kFloat64);
  unit_columns(a, {8 * epsilon(), frobenius_.as<double>(), nullptr}, random(), lengths.as<double>(), stream());
  return lengths;
}

DenseCuda::Eigen DenseCuda::eigen(const Array& gram) const {
  const int64_t n = gram.rows;
  const Array w = array(1, n, Type::kFloat64), info = array(1, 1, Type::kInt32);
  symmetric_eigenvectors(*context_, gram, w.data, info.as<int>());
  Eigen made{array(1, n, Type::kFloat64), array(n, n, Type::kFloat64), array(1, 1, Type::kFloat64)};
  descending_eigenpairs(w.as<double>(), gram, info.as<int>(), made.lambda, made.q, made.sigma.as<double>(),
                        failed_.as<int>(), stream());
  return made;
}

std::pair<DenseCuda::Array, DenseCuda::Array> DenseCuda::gram_eigen(const Array& y) {
  Eigen found = eigen(gram(y));
  sigma_ = found.sigma;
  ritz_ = true;
  return {found.lambda, found.q};
}

DenseCuda::Array DenseCuda::largest_value(const Array& y) const { return eigen(gram(y)).sigma; }

DenseCuda::Array DenseCuda::largest_tails(const Array& q, int64_t block, int64_t rank) const {
  const int64_t count = std::max(rank, block);  // then the numbers below block are all of them
  const Array tails = array(1, count, Type::kFloat64), which = array(1, block, Type::kInt32);
  longest_tails(q, block, count, tails.as<double>(), which.as<int>(), stream());
  return which;
}

DenseCuda::Array DenseCuda::ritz_residuals(const Array& v, const Array& y, const Array& lambda, const Array& which,
                                           const Array& place) const {
  if (iteration_.products == core::Products::kBFloat16) {
    multiply_terms(split(y, iteration_.terms, &which), place, /*back=*/true, iteration_.terms);
  } else {
    const Array picked = empty(y.rows, which.cols);
    gather_columns(y, which.as<int>(), picked, stream());
    multiply(picked, place, /*back=*/true, iteration_);
  }
  subtract_ritz(v, lambda, which.as<int>(), place, stream());
  return place;
}

DenseCuda::Array DenseCuda::ritz_values(const Array& lambda, const Array& which) const {
  const Array values = array(1, which.cols, Type::kFloat64);
  cuda::ritz_values(lambda, which.as<int>(), values, stream());
  return values;
}

std::vector<double> DenseCuda::relative_size(const Array& r, const Array& lambda, const Array& which) const {
  const Array sizes = column_norms(r), worst = array(1, 1, Type::kFloat64);
  relative_sizes({sizes.as<double>(), which.as<int>(), which.cols, plan_.rank, 4 * epsilon(), floor_,
                  frobenius_.as<double>(), failed_.as<int>()},
                 lambda, worst.as<double>(), stream());
  std::vector<double> host(batch());
  read_back(*context_, host.data(), worst.data, host.size() * sizeof(double));
  return host;
}

// As many at once as the temporary bytes allow: XsyevBatched takes matrices of this size well, Xsyevd is made for
// larger.
DenseCuda::Array DenseCuda::gram_vectors() {
  const int64_t n = plan_.cols;
  const Type summed = weights_.type == Type::kFloat64 ? Type::kFloat64 : Type::kFloat32;
  const Array made = empty(n, plan_.rank), w = array(1, n, summed), info = array(1, 1, Type::kInt32);
  const int64_t together =
      n > kLargestBatchedEigen ? 1 : std::max<int64_t>(1, temporary_bytes_ / (n * n * size_of(summed)));
  for (int64_t b = 0, count = 0; b < batch(); b += count) {
    count = 1;
    while (count < together && b + count < batch() && positions_[b + count] == positions_[b] + count) ++count;
    const Array square = array(n, n, summed, count);
    const Matrices a = slice(weights_, positions_[b], count);
    gemm(*context_, {a, plan_.transposed}, {a, !plan_.transposed}, square, plan_.rows, 1, 0, Gemm::kPedantic);
    void* const values = w.as<char>() + b * n * size_of(summed);
    int* const infos = info.as<int>() + b;
    if (count > 1) {
      symmetric_eigenvectors(*context_, square, values, infos);
    } else {
      symmetric_eigenvectors_one(*context_, square, values, infos);
    }
    cuda::copy(columns(square, n - plan_.rank, plan_.rank), slice(made, b, count), stream());
  }
  mark_failures(info.as<int>(), batch(), failed_.as<int>(), stream());
  return made;
}

}  // namespace osora::cuda
