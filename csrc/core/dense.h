// SPDX-License-Identifier: Apache-2.0
// What the Lanczos method (core/lanczos.h) asks of an algebra: one for ATen (csrc/torch/svd/dense_aten.h), one for
// cuBLAS and cuSOLVER (csrc/cuda/svd/dense_cuda.h). Both are checked against it where they are defined.
//
// An algebra owns a batch of matrices A [B, rows, cols] (rows >= cols, scaled by a power of two) and does every
// product, factorisation and random number. Its primitives may all be queued on a device; the host waits in
// relative_size() and report() alone.
#pragma once
#include <concepts>
#include <cstdint>
#include <utility>
#include <vector>

#include "core/svd_plan.h"

namespace osora::core {

// The answer for one matrix: W = U diag(S) V^T restricted to `rank`; U [d, r], S [r], V [k, r], residuals [r];
// floor, can_be_finer: of its verdict. converged: certified, and the probe found no larger triplet.
template <class Array>
struct Found {
  Array u, s, v, residuals;
  double floor = 0;
  bool converged = false, can_be_finer = false;
  int64_t passes = 0;   // products with W or W^T, of any width
  int64_t columns = 0;  // columns multiplied in them: 2 d k columns are the flops
};

template <class Array>
struct Candidate {
  Found<Array> found;
  bool missed = false;  // the probe saw more than sigma_r
};

// The first random stream of the probe after restart number `turn`; refills during it take the next ones. A second
// probe must not repeat the first: the space has since been given what that one saw, and nothing else.
inline uint32_t probe_stream(int64_t turn) { return (1u << 31) + 256u * static_cast<uint32_t>(turn); }

template <class D>
using ArrayOf = typename D::Array;

// a, b, c are arrays [B, *, *], of which the first argument of a change is written. `at` are positions in the batch.
template <class D>
concept Dense =
    std::copyable<D> && std::default_initializable<ArrayOf<D>> && std::copyable<ArrayOf<D>> &&
    requires(D& dense, const D& fixed, ArrayOf<D>& a, const ArrayOf<D>& b, const ArrayOf<D>& c,
             const std::vector<int64_t>& at, int64_t n, double tol, const typename D::Certificate& certificate) {
      { D::kRounds } -> std::convertible_to<int>;     // of Cholesky QR at most, where one must be orthonormal
      { D::kLockstep } -> std::convertible_to<bool>;  // a batch of matrices iterates together
      { fixed.batch() } -> std::same_as<int64_t>;     // B
      { fixed.plan() } -> std::same_as<const SvdPlan&>;

      // -- storage
      { fixed.empty(n, n) } -> std::same_as<ArrayOf<D>>;       // rows, columns
      { fixed.columns(b, n, n) } -> std::same_as<ArrayOf<D>>;  // some of b, from one on: the same memory
      { fixed.clone(b) } -> std::same_as<ArrayOf<D>>;
      { fixed.select(b, at) } -> std::same_as<ArrayOf<D>>;  // a copy
      { fixed.only(at) } -> std::same_as<D>;                // shares the weights
      fixed.copy(a, b);
      fixed.insert(a, n, b, n);  // b[n] into the first columns of a[n]

      // -- products
      fixed.times(b, a);          // a = A b
      fixed.times_exactly(b, a);  // in the precision of the certificate
      // a = A b; A^T a, and the lengths of a's columns [B, 1, columns]. b: where A^T a will be kept; it may be made
      // there.
      { fixed.times_and_back(b, a, b) } -> std::same_as<std::pair<ArrayOf<D>, ArrayOf<D>>>;
      { fixed.transposed_times_exactly(b) } -> std::same_as<ArrayOf<D>>;  // A^T b
      { fixed.product(b, c) } -> std::same_as<ArrayOf<D>>;                // b c, c in float64
      fixed.project_out(a, b);                                            // a -= b (b^T a)
      fixed.rotate(a, a, b, n, n);                                        // both a[:, :keep] = a[:, :width] b[:, :keep]

      // -- orthonormalisation
      { dense.orthonormal_gaussian() } -> std::same_as<ArrayOf<D>>;  // [B, cols, block]
      { dense.probe_gaussian(n, n) } -> std::same_as<ArrayOf<D>>;    // [B, cols, count], of probe_stream(turn)
      { fixed.zero_norms(n) } -> std::same_as<ArrayOf<D>>;           // [B, 1, count]
      // a -> orthonormal columns, orthogonal to b [*, *, width] (orthonormal). A column whose projection is no more
      // than rounding, measured by sigma_1 times the norms c [B, 1, columns of a], is replaced by a random one.
      dense.orthonormalise(a, b, c);
      // 1 for columns that were orthonormal before, less the worse conditioned they were, 0 if that was not measured.
      { dense.cholesky_qr(a) } -> std::same_as<double>;
      { dense.take_lengths(a) } -> std::same_as<ArrayOf<D>>;  // float64 [B, 1, columns]; columns of length one

      // -- Rayleigh-Ritz
      { dense.gram_eigen(b) } -> std::same_as<std::pair<ArrayOf<D>, ArrayOf<D>>>;  // of b^T b: values, vectors
      { fixed.largest_value(b) } -> std::same_as<ArrayOf<D>>;                      // the largest singular value, [B]
      { fixed.largest_tails(b, n, n) } -> std::same_as<ArrayOf<D>>;                // column numbers [B, block]
      { fixed.ritz_residuals(b, b, b, c, b) } -> std::same_as<ArrayOf<D>>;  // v, y, lambda, which, where it may be made
      { fixed.ritz_values(b, c) } -> std::same_as<ArrayOf<D>>;              // of lambda, which: [B, 1, count]
      { fixed.relative_size(b, b, c) } -> std::same_as<std::vector<double>>;  // of r, lambda, which: one per matrix

      // -- the answer
      { fixed.certify(b, b, b, tol) } -> std::same_as<typename D::Certificate>;  // left, values, right
      // Values of A, and what the probe saw (or null).
      { fixed.report(certificate, b, &c, tol) } -> std::same_as<std::vector<Candidate<ArrayOf<D>>>>;
    };

}  // namespace osora::core
