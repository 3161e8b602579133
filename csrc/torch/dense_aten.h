// SPDX-License-Identifier: Apache-2.0
// The Dense algebra of core/svd.h on ATen: the CPU's model, and that of any torch device without one of its own.
// An Array is a tensor [B, rows, cols]. Written for small B: on the CPU every matrix is a batch of its own.
#pragma once
#include <ATen/core/Tensor.h>

#include <utility>
#include <vector>

#include "core/svd.h"
#include "core/svd_plan.h"

namespace osora {

class DenseAten {
 public:
  using Array = at::Tensor;

  // weights: finite matrices [d, k] of one shape and device; work: dtype of the products (float32 or float64);
  // out: dtype the factors are rounded to before they are certified. Takes one scaled copy of the weights.
  DenseAten(const std::vector<at::Tensor>& weights, const core::SvdPlan& plan, at::ScalarType work, at::ScalarType out,
            uint64_t seed, const std::vector<uint64_t>& keys);

  int64_t batch() const { return a_.size(0); }

  // -- storage ------------------------------------------------------------------------------------------------------
  Array empty(int64_t rows, int64_t cols) const;
  static Array columns(const Array& a, int64_t begin, int64_t count) { return a.narrow(2, begin, count); }
  static void copy(Array target, const Array& source) { target.copy_(source); }
  Array select(const Array& a, const std::vector<int64_t>& positions) const;
  void retain(const std::vector<int64_t>& positions);

  // -- products -----------------------------------------------------------------------------------------------------
  void times(const Array& x, Array y) const;                                  // y = A x
  Array transposed_times(const Array& y) const;                               // A^T y
  void project_out(Array& z, const Array& v) const;                           // z -= v (v^T z)
  static void rotate(Array& v, const Array& q, int64_t width, int64_t keep);  // v[:, :keep] = v[:, :width] q[:, :keep]

  // -- orthonormalisation -------------------------------------------------------------------------------------------
  Array orthonormal_gaussian(int64_t rows, int64_t cols);
  static Array column_norms(const Array& a);  // [B, 1, cols]
  // z -> orthonormal columns, orthogonal to v. A column whose projection is no more than rounding, measured by
  // sigma_1 times `norms` [B, 1, cols], is replaced by a random one.
  void orthonormalise(Array& z, const Array& v, const Array& norms);

  // -- Rayleigh-Ritz ------------------------------------------------------------------------------------------------
  std::pair<Array, Array> gram_eigen(const Array& y);  // Y^T Y in float64: eigenvalues (descending) and vectors
  static Array largest_tails(const Array& q, int64_t block, int64_t rank);
  Array ritz_residuals(const Array& v, const Array& y, const Array& lambda, const Array& which) const;
  static Array ritz_values(const Array& lambda, const Array& which);  // singular values, [B, 1, count]
  std::vector<double> relative_size(const Array& r, const Array& lambda, const Array& which, int64_t rank) const;

  // -- the answer ---------------------------------------------------------------------------------------------------
  struct Candidate {
    core::Found<Array> found;
    Array missed;  // what the probe saw, [cols, probes]; undefined if it saw nothing above sigma_r
  };
  // From Ritz vectors v [B, cols, rank] of matrix b: U, S, V of W itself with W V = U S, certified.
  Candidate triplets(int64_t b, const Array& v, double tol, bool probe = true);
  void insert_probe(Array& r, int64_t b, const Array& missed) const;
  core::Found<Array> gram(int64_t b, double tol);
  core::Found<Array> full(int64_t b, double tol);

 private:
  core::Found<Array> certify(int64_t b, Array u, Array s, Array v, double tol) const;
  Array probe(int64_t b, const Array& u, const Array& v, double smallest, int64_t& passes);
  Array gaussian(int64_t rows, int64_t cols);
  double cholesky_round(Array& z) const;
  void refill(Array& z, const Array& bad);
  DenseAten one(int64_t b) const;

  core::SvdPlan plan_;
  at::ScalarType work_, out_;
  uint64_t seed_;
  std::vector<uint64_t> keys_;
  uint32_t draws_ = 0;          // streams used so far
  at::Tensor a_;                // [B, rows, cols], scaled by 2^-exponent
  std::vector<int> exponents_;  // per matrix
  at::Tensor frobenius_;        // [B, 1, 1] of the scaled matrices, float64
  at::Tensor sigma_;            // [B, 1, 1] largest singular value seen so far
};

}  // namespace osora
