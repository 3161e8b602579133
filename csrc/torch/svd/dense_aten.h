// SPDX-License-Identifier: Apache-2.0
// The Dense algebra (core/dense.h) on ATen: the CPU's model, and that of any torch device without one of its own.
// An Array is a tensor [B, rows, cols]. Written for small B: on the CPU every matrix is a batch of its own.
#pragma once
#include <ATen/core/Tensor.h>

#include <memory>
#include <utility>
#include <vector>

#include "core/dense.h"
#include "core/svd_plan.h"
#include "torch/svd/panels.h"

namespace osora {

// From 1 to the next number, in float64 or float32.
inline double epsilon(at::ScalarType type) { return type == at::kDouble ? 0x1p-52 : 0x1p-23; }

class DenseAten {
 public:
  using Array = at::Tensor;
  static constexpr int kRounds = 5;         // of Cholesky QR at most; as a rule two
  static constexpr bool kLockstep = false;  // it iterates on one matrix at a time (svd.cpp)

  // weights: matrices [d, k] of one shape and device; work: dtype of the products (float32 or float64); out: dtype the
  // factors are rounded to before they are certified.
  DenseAten(const std::vector<Panels>& weights, const core::SvdPlan& plan, const at::TensorOptions& work,
            at::ScalarType out, uint64_t seed, const std::vector<uint64_t>& keys);

  int64_t batch() const { return int64_t(weights_.size()); }
  const core::SvdPlan& plan() const { return plan_; }

  // -- storage ------------------------------------------------------------------------------------------------------
  Array empty(int64_t rows, int64_t cols) const;
  static Array clone(const Array& a) { return a.clone(); }
  static Array columns(const Array& a, int64_t begin, int64_t count) { return a.narrow(2, begin, count); }
  static void copy(Array target, const Array& source) { target.copy_(source); }
  static Array select(const Array& a, const std::vector<int64_t>& positions);  // a copy
  DenseAten only(const std::vector<int64_t>& positions) const;                 // shares the weights

  // -- products -----------------------------------------------------------------------------------------------------
  void times(const Array& x, Array y) const;  // y = A x
  // y = A x, returns A^T y, made in an array of its own, and the lengths of y's columns.
  std::pair<Array, Array> times_and_back(const Array& x, Array y, const Array& place) const;
  Array transposed_times(const Array& y) const;  // A^T y
  void times_exactly(const Array& x, Array y) const { times(x, y); }
  Array transposed_times_exactly(const Array& y) const { return transposed_times(y); }
  Array product(const Array& a, const Array& q) const;  // a q, q in float64
  void project_out(Array& z, const Array& v) const;     // z -= v (v^T z)
  // v[:, :keep] = v[:, :width] q[:, :keep], and y the same.
  static void rotate(Array& v, Array& y, const Array& q, int64_t width, int64_t keep);

  // -- orthonormalisation -------------------------------------------------------------------------------------------
  Array orthonormal_gaussian();                       // [B, cols, block]
  Array probe_gaussian(int64_t count, int64_t turn);  // [B, cols, count], of streams of its own
  Array zero_norms(int64_t count) const;              // [B, 1, count]
  static Array column_norms(const Array& a);          // [B, 1, cols]
  void orthonormalise(Array& z, const Array& v, const Array& norms);
  // Columns of length one; what is rounding, measured by sigma_1 times `norms`, becomes Gaussian.
  void drop_noise(Array& z, const Array& norms);
  double cholesky_qr(Array& z) const;
  Array take_lengths(Array& left);  // float64 lengths [B, 1, cols]; columns of length one, or Gaussian

  // -- Rayleigh-Ritz ------------------------------------------------------------------------------------------------
  std::pair<Array, Array> gram_eigen(const Array& y);  // Y^T Y in float64: eigenvalues (descending) and vectors
  static Array largest_tails(const Array& q, int64_t block, int64_t rank);
  Array ritz_residuals(const Array& v, const Array& y, const Array& lambda, const Array& which,
                       const Array& place) const;                     // in an array of its own
  static Array ritz_values(const Array& lambda, const Array& which);  // singular values, [B, 1, count]
  std::vector<double> relative_size(const Array& r, const Array& lambda, const Array& which) const;

  // -- the answer ---------------------------------------------------------------------------------------------------
  struct Certificate {
    Array u, s, v;        // of W: [B, d, r], [B, r], [B, k, r] in the dtype `out`
    Array stored, sizes;  // [B, r] in float64, of A: s as it is handed out, and |A^T u - s v|
  };
  // From u, s, v with W v = u s but for the scale: sorted, signed, rounded, and measured.
  Certificate certify(Array u, Array s, Array v, double tol) const;
  // values [B, 1, r] of A and what the probe saw [B] (or null): the verdict on each matrix.
  std::vector<core::Candidate<Array>> report(const Certificate& certificate, const Array& values, const Array* seen,
                                             double tol) const;
  static Array largest_value(const Array& y);                          // the largest singular value, [B]
  static void insert(Array& r, int64_t b, const Array& x, int64_t i);  // x[i] into the first columns of r[b]
  // Starting points of the other methods.
  Array gram_vectors() const;                // eigenvectors of A^T A, the first `rank`: [B, cols, rank]
  Array subspace_iteration(int64_t passes);  // as torch.svd_lowrank(q=rank, niter=passes): [B, cols, rank]
  std::vector<core::Candidate<Array>> full(double tol) const;

 private:
  Array gaussian(int64_t rows, int64_t cols);
  void refill(Array& z, const Array& bad);

  core::SvdPlan plan_;
  at::TensorOptions options_;
  at::ScalarType work_, out_;
  double floor_, noise_;  // of rounding, over sigma_1
  uint64_t seed_;
  std::vector<uint64_t> keys_;
  uint32_t draws_ = 0;  // streams used so far
  std::vector<std::shared_ptr<const Panels>> weights_;
  at::Tensor frobenius_;  // [B, 1, 1] of the scaled matrices, float64
  at::Tensor sigma_;      // [B, 1, 1] largest singular value seen so far
};
static_assert(core::Dense<DenseAten>);

}  // namespace osora
