// SPDX-License-Identifier: Apache-2.0
// The small steps of the truncated SVD on a GPU, between the products: pointers, sizes, a stream. No torch and no CUDA
// header, so that host code sees the same declarations as the emulator.
//
// Every length is a float64 sum in a fixed order, every extreme takes the lowest index on ties, nothing waits for the
// device. Arguments named `out` are written, the others are read.
#pragma once
#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace osora::cuda {

using Stream = CUstream_st*;  // cudaStream_t

enum class Type { kFloat64, kFloat32, kBFloat16, kFloat16, kInt32, kInt64 };
constexpr int64_t size_of(Type type) {
  if (type == Type::kFloat64 || type == Type::kInt64) return 8;
  return type == Type::kFloat32 || type == Type::kInt32 ? 4 : 2;
}

// A batch of matrices [rows, cols], column by column without a gap, `stride` numbers from one matrix to the next.
struct Matrices {
  void* data = nullptr;
  Type type = Type::kFloat32;
  int64_t rows = 0, cols = 0, batch = 0, stride = 0;

  void* at(int64_t b, int64_t col = 0) const {
    return static_cast<char*>(data) + (b * stride + col * rows) * size_of(type);
  }
};

// -- the weights ------------------------------------------------------------------------------------------------------
// Row-major and contiguous [d, k], one address per matrix of the batch, in device memory.
struct Sources {
  const void* const* addresses;
  Type type;
  int64_t d, k, batch;
};
// Scratch numbers per matrix of the next two.
int64_t weight_partials(int64_t d);
// out[b] = the e with largest |w| in [2^(e-1), 2^e); 0 for a zero matrix. Int32.
void weight_exponents(const Sources& weights, double* partial, int* out, Stream stream);
// out[b] = w 2^-exponent: [ld, d] with ld >= k, whose rows beyond k are 0. norms[b]: Frobenius norm.
void scale_weights(const Sources& weights, const int* exponents, double* partial, const Matrices& out, double* norms,
                   Stream stream);

// -- moves ------------------------------------------------------------------------------------------------------------
// Host numbers as arguments of a launch: no copy that would wait, nothing to keep alive.
void store_words(const uint64_t* host, int64_t count, uint64_t* out, Stream stream);
void matrix_addresses(const Matrices& matrices, void** out, Stream stream);
// Of equal shapes; between float64 and float32 it rounds. Also from bfloat16 to float64.
void copy(const Matrices& from, const Matrices& out, Stream stream);
// out[:, j] = from[:, which[j]]; which: Int32 [batch, out.cols].
void gather_columns(const Matrices& from, const int* which, const Matrices& out, Stream stream);
// float32 [n, cols] -> bfloat16 [ld, terms * cols], whose sum over the terms is `from` to 8 bits per term; of the
// columns which [batch, cols], if it is not null.
void split_terms(const Matrices& from, const int* which, int terms, const Matrices& out, Stream stream);
// float32 [n, terms * cols] -> the sum over the terms, the smallest first; terms is 2 or 3.
void sum_terms(const Matrices& from, int terms, const Matrices& out, Stream stream);
// The same; and the sum split again, and the lengths of its columns [batch, cols].
void sum_and_split_terms(const Matrices& from, int terms, const Matrices& out, const Matrices& next, double* norms,
                         Stream stream);

// -- columns ----------------------------------------------------------------------------------------------------------
// Number i * cols + j of `stream_number` and of matrix b's key goes to row i, column j: as in core/philox.h.
struct Random {
  const uint64_t* keys;  // mixed_key() per matrix
  uint32_t stream_number;
};
void fill_normal(const Matrices& out, const Random& random, Stream stream);
void column_norms(const Matrices& from, double* out, Stream stream);  // [batch, cols]

// What counts as no column at all: nothing longer than level * scale[b]; or, with norms [batch, cols], the rule of the
// Lanczos step: level * seen * max(norms[j], level * seen), where seen = max(scale[b], norms).
struct Noise {
  double level = 0;
  const double* scale = nullptr;  // [batch]; may be null: 0
  const double* norms = nullptr;
};
// out[b] = the largest of itself and of values [batch, count].
void raise_to_largest(const double* values, int64_t count, int64_t batch, double* out, Stream stream);
// Columns to length one; noise, zero and NaN are replaced by random ones. lengths [batch, cols]: before; may be null.
void unit_columns(const Matrices& matrices, const Noise& noise, const Random& random, double* lengths, Stream stream);

// -- Cholesky QR of at most kMostColumns columns (svd_orthogonal.cu) --------------------------------------------------
constexpr int64_t kMostColumns = 64;
constexpr double kWellConditioned = 0.7;
int64_t row_strips(int64_t rows);  // that a matrix is cut into
// Each of these leaves matrices alone whose wanted[b] is 0; `wanted` may be null.
// Gram matrices of the strips in float64: [batch, strips, cols, cols].
void gram_parts(const Matrices& z, const int* wanted, double* parts, Stream stream);
// z = z D^-1 L^-T with L L^T = D^-1 z^T z D^-1 + shift I and the lengths D of the columns, from gram_parts(). A column
// that is noise, zero or NaN, or whose pivot is <= least, becomes one of random(), of a length near one, and has no
// part in the others. again[b] (may be null): 0 if the smallest pivot times its column's length is above
// kWellConditioned.
struct CholeskyRound {
  Noise noise;
  Random random;
  double shift, least;
  const int* wanted;
  int* again;
};
void solve_strips(const Matrices& z, const double* parts, const CholeskyRound& round, Stream stream);
// v^T z of the strips in float64: [batch, strips, columns of z, columns of v].
void inner_parts(const Matrices& v, const Matrices& z, const int* wanted, double* parts, Stream stream);
// z -= v (the sum of inner_parts()).
void subtract_inside(const Matrices& v, const double* parts, const int* wanted, const Matrices& z, Stream stream);

// -- Cholesky, eigenvectors -------------------------------------------------------------------------------------------
// gram += shift I; identity = I.
void shift_gram(const Matrices& gram, double shift, const Matrices& identity, Stream stream);
// out = the inverse of the factor (lower), with rows of zeros where the pivot is <= least or the factor failed; a
// failure also sets failed[b] = 1.
void usable_inverse(const Matrices& factor, const Matrices& inverse, const int* info, double least, int* failed,
                    const Matrices& out, Stream stream);
// Ascending eigenvalues w [batch, n] and their vectors to descending lambda >= 0 and q, sigma[b] = sqrt(lambda[0]).
// Where the solver failed: zeros, and failed[b] = 1.
void descending_eigenpairs(const double* w, const Matrices& vectors, const int* info, const Matrices& lambda,
                           const Matrices& q, double* sigma, int* failed, Stream stream);
// failed[b] = 1 where info[b] is not 0.
void mark_failures(const int* info, int64_t batch, int* failed, Stream stream);
// out[b] = largest |(gram - I)[i, j]|.
void gram_defects(const Matrices& gram, double* out, Stream stream);

// -- Rayleigh-Ritz ----------------------------------------------------------------------------------------------------
// The numbers of those `block` of the first `count` columns, count >= block, whose last `block` rows are the longest,
// the longest first: [batch, block]. tails: scratch [batch, count].
void longest_tails(const Matrices& q, int64_t block, int64_t count, double* tails, int* out, Stream stream);
// The numbers of the `keep` largest of values [batch, count], the largest first: [batch, keep].
void largest_first(const double* values, int64_t count, int64_t keep, int64_t batch, int* out, Stream stream);
// r[:, j] -= v[:, which[j]] lambda[which[j]].
void subtract_ritz(const Matrices& v, const Matrices& lambda, const int* which, const Matrices& r, Stream stream);
// out[j] = sqrt(lambda[which[j]]).
void ritz_values(const Matrices& lambda, const int* which, const Matrices& out, Stream stream);
// out[b] = largest sizes[j] / (sigma max(sigma, floor sigma_1)) with sigma^2 = lambda[which[j]]; without those that are
// rounding (by level * frobenius), and without which[j] >= rank. NaN where failed[b].
struct RitzSizes {
  const double* sizes;  // [batch, count]
  const int* which;     // [batch, count]
  int64_t count, rank;
  double level, floor;
  const double* frobenius;
  const int* failed;
};
void relative_sizes(const RitzSizes& input, const Matrices& lambda, double* out, Stream stream);

// -- the answer -------------------------------------------------------------------------------------------------------
// Columns in the order of `order` [batch, r], the largest |u| of each positive, rounded to the type of the outputs.
struct Triplets {
  Matrices u, v;    // [d, r], [k, r]
  const double* s;  // [batch, r], scaled
  const int* order;
  const int* exponents;
};
// out_s = s 2^exponent, rounded to its type; stored[j] = that number times 2^-exponent.
void finish_triplets(const Triplets& input, const Matrices& out_u, const Matrices& out_v, const Matrices& out_s,
                     double* stored, Stream stream);
// out[j] = |product[:, j] - v[:, j] stored[j]|, in float64.
void residual_norms(const Matrices& product, const Matrices& v, const double* stored, double* out, Stream stream);

// One row of numbers per matrix, for the one read of a certificate.
enum ReportEntry { kDefect, kSmallest, kSeen, kFailed, kExponent, kSizes };
struct Report {
  const double* sizes;   // [batch, r]
  const double* stored;  // [batch, r]
  const double* values;  // [batch, r]
  int64_t r, batch;
  const double *defect_u, *defect_v, *seen;  // [batch]; seen may be null
  const int *failed, *exponents;
};
// [batch, kSizes + 2 r]: the entries above, sizes, stored.
void pack_report(const Report& input, double* out, Stream stream);

}  // namespace osora::cuda
