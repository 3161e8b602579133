// SPDX-License-Identifier: Apache-2.0
// The truncated SVD, once: thick-restart randomised block Lanczos on A^T A, for a batch of matrices in lockstep.
//
// It is written over a `Dense` algebra, which owns the batch A [B, rows, cols] (rows >= cols, scaled by a power of two)
// and does every product, factorisation and random number. csrc/torch/dense_aten.h is one model; an Array is a batch of
// matrices there. The method, its sources and its measurements: docs/svd.md.
//
// In words: V [cols, basis] grows by blocks of the Krylov space of A^T A, with Y = A V kept beside it. Rayleigh-Ritz on
// Y^T Y (float64) turns both to Ritz vectors; the best `keep` stay, the residuals of the worst become the next block,
// until the residuals are small. A matrix leaves the batch when its triplets are certified.
#pragma once
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "core/svd_plan.h"

namespace osora::core {

// The answer for one matrix: A = U diag(S) V^T restricted to `rank`; U [rows, r], S [r], V [cols, r] (of W, see
// Dense::triplets), residuals [r], converged: every residual <= tol and no larger triplet was found by the probe.
template <class Array>
struct Found {
  Array u, s, v, residuals;
  bool converged = false;
  int64_t passes = 0;  // products with W or W^T, of any width
};

// Stops a matrix that makes no progress: rounding allows no more (the caller may try again in float64).
struct Progress {
  double target;                                          // the residual that ends the iteration
  double best = std::numeric_limits<double>::infinity();  // smallest so far
  int stalled = 0, rejected = 0;

  bool hopeless(double worst) {
    stalled = worst < 0.8 * best ? 0 : stalled + 1;
    best = std::min(best, worst);
    return stalled >= 8 || rejected >= 4;
  }
};

template <class Dense>
std::vector<Found<typename Dense::Array>> block_lanczos(Dense dense, const SvdPlan& plan, double tol,
                                                        int64_t max_passes) {
  using Array = typename Dense::Array;
  std::vector<Found<Array>> found(dense.batch());
  std::vector<int64_t> ids(dense.batch());  // position in the batch -> matrix
  std::iota(ids.begin(), ids.end(), 0);
  std::vector<Progress> progress(dense.batch(), Progress{0.8 * tol});

  Array V = dense.empty(plan.cols, plan.basis), Y = dense.empty(plan.rows, plan.basis);
  int64_t width = 0, passes = 0;
  const auto append = [&](const Array& block) {
    dense.copy(dense.columns(V, width, plan.block), block);
    dense.times(block, dense.columns(Y, width, plan.block));
    width += plan.block;
    ++passes;
  };
  append(dense.orthonormal_gaussian(plan.cols, plan.block));

  for (;;) {
    while (width + plan.block <= plan.basis) {
      const Array last = dense.columns(Y, width - plan.block, plan.block);
      Array Z = dense.transposed_times(last);
      ++passes;
      // A column of Z that the projection leaves at the rounding level of sigma_1 |y_j| has nothing new to say.
      dense.orthonormalise(Z, dense.columns(V, 0, width), dense.column_norms(last));
      append(Z);
    }

    // Rayleigh-Ritz on all columns; the tail is the share of the newest block in each Ritz vector, to which the
    // residual is proportional in exact arithmetic.
    auto [lambda, Q] = dense.gram_eigen(dense.columns(Y, 0, width));
    const auto worst = dense.largest_tails(Q, plan.block, plan.rank);  // [B, block] column numbers
    dense.rotate(V, Q, width, plan.keep);
    dense.rotate(Y, Q, width, plan.keep);
    width = plan.keep;
    const Array kept = dense.columns(V, 0, width);
    Array R = dense.ritz_residuals(V, Y, lambda, worst);  // A^T y_i - lambda_i v_i
    ++passes;
    dense.project_out(R, kept);
    dense.project_out(R, kept);
    Array norms = dense.ritz_values(lambda, worst);                                     // |y_i|
    const std::vector<double> size = dense.relative_size(R, lambda, worst, plan.rank);  // the one read per restart

    std::vector<int64_t> leaving, staying;
    for (int64_t b = 0; b < dense.batch(); ++b) {
      Progress& state = progress[ids[b]];
      const bool give_up = state.hopeless(size[b]) || passes >= max_passes;
      if (size[b] > state.target && !give_up) {
        staying.push_back(b);
        continue;
      }
      auto candidate = dense.triplets(b, dense.columns(V, 0, plan.rank), tol);
      Found<Array>& result = found[ids[b]];
      result = candidate.found;
      result.passes += passes;
      if (result.converged || give_up) {
        leaving.push_back(b);
      } else {  // certificate or probe objects: go on, more strictly, from what the probe saw
        ++state.rejected;
        state.target /= 4;
        dense.insert_probe(R, b, candidate.missed);
        staying.push_back(b);
      }
    }
    if (staying.empty()) return found;
    if (!leaving.empty()) {
      std::vector<int64_t> next;
      for (const int64_t b : staying) next.push_back(ids[b]);
      ids = std::move(next);
      dense.retain(staying);
      V = dense.select(V, staying);
      Y = dense.select(Y, staying);
      R = dense.select(R, staying);
      norms = dense.select(norms, staying);
    }
    dense.orthonormalise(R, dense.columns(V, 0, width), norms);
    append(R);
  }
}

}  // namespace osora::core
