// SPDX-License-Identifier: Apache-2.0
// Orthonormal columns and Rayleigh-Ritz.
#include <algorithm>
#include <cmath>

#include "cuda/svd/dense_cuda.h"

namespace osora::cuda {
namespace {

// On the diagonal of a Gram matrix of unit columns, summed in float64: above what its sum and its factorisation lose,
// so that dependent columns get a small pivot and not a failure.
double shift(int64_t cols) { return 1e-13 + static_cast<double>(cols) * 0x1p-52; }

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

void DenseCuda::drop_noise(const Array& z, const Array& norms) {
  // Until Rayleigh-Ritz tells sigma_1: of all blocks so far, since a block of noise has norms of noise alone.
  if (!ritz_) raise_to_largest(norms.as<double>(), norms.cols, batch(), sigma_.as<double>(), stream());
  // 16 epsilon: a column at that level is rounding; ten times more stalls convergence, none at all keeps noise.
  unit_columns(z, {16 * epsilon(), sigma_.as<double>(), norms.as<double>()}, random(), nullptr, stream());
}

// The condition is not measured: that would wait for the device. All rounds are made.
double DenseCuda::cholesky_qr(Array& z) {
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
  // A pivot at the rounding level leaves a column of noise: zero, so that the next round draws a random one.
  const double least = std::max(64 * epsilon(), 1e-6);
  usable_inverse(factor, inverse, info.as<int>(), least, failed_.as<int>(), scaled, stream());
  const Array made = empty(z.rows, n);
  // Orthonormal columns come out as they were: the shift has made the factor longer by this.
  gemm(*context_, {z}, {scaled, true}, made, n, std::sqrt(1 + shift(n)));
  z = made;
  return 0;
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
  const Array tail = array(1, count, Type::kFloat64), which = array(1, block, Type::kInt32);
  tails(q, block, count, tail.as<double>(), stream());
  largest_first(tail.as<double>(), count, block, batch(), which.as<int>(), stream());
  return which;
}

DenseCuda::Array DenseCuda::ritz_residuals(const Array& v, const Array& y, const Array& lambda,
                                           const Array& which) const {
  const Array picked = empty(y.rows, which.cols);
  gather_columns(y, which.as<int>(), picked, stream());
  const Array r = transposed_times(picked);
  subtract_ritz(v, lambda, which.as<int>(), r, stream());
  return r;
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

DenseCuda::Array DenseCuda::gram_vectors() {
  const int64_t n = plan_.cols;
  const Type summed = weights_.type == Type::kFloat64 ? Type::kFloat64 : Type::kFloat32;
  const Array made = empty(n, plan_.rank), w = array(1, n, summed), info = array(1, 1, Type::kInt32);
  for (int64_t b = 0; b < batch(); ++b) {
    const Array square = array(n, n, summed, 1);
    const Matrices a = slice(weights_, positions_[b], 1);
    gemm(*context_, {a, plan_.transposed}, {a, !plan_.transposed}, square, plan_.rows);
    symmetric_eigenvectors_one(*context_, square, w.as<char>() + b * n * size_of(summed), info.as<int>() + b);
    cuda::copy(columns(square, n - plan_.rank, plan_.rank), slice(made, b, 1), stream());
  }
  mark_failures(info.as<int>(), batch(), failed_.as<int>(), stream());
  return made;
}

}  // namespace osora::cuda
