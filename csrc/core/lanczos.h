// SPDX-License-Identifier: Apache-2.0
// The truncated SVD, once: thick-restart randomised block Lanczos on A^T A, for a batch of matrices in lockstep, and
// the last step and certificate that every method shares.
//
// Written over a Dense algebra (core/dense.h), which does every product, factorisation and random number. The method,
// its sources and its measurements: docs/svd.md.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "core/dense.h"
#include "core/svd_plan.h"

namespace osora::core {

constexpr int64_t kProbes = 8;           // Gaussian vectors that look for a missed triplet
constexpr int64_t kProbeIterations = 4;  // power iterations they get

// Rayleigh-Ritz on orthonormal x with y = M x: rotates x to the right singular vectors of M on its span; returns the
// left ones, orthonormal, and the values [B, 1, columns] in float64.
template <Dense D>
std::pair<ArrayOf<D>, ArrayOf<D>> singular_vectors(D& dense, ArrayOf<D>& x, const ArrayOf<D>& y) {
  using Array = ArrayOf<D>;
  const Array q = dense.gram_eigen(y).second;
  x = dense.product(x, q);
  Array left = dense.product(y, q);
  // A value at the rounding level of A has no left vector of its own: any orthonormal one serves.
  Array s = dense.take_lengths(left);
  for (int round = 0; round < D::kRounds; ++round) {
    if (dense.cholesky_qr(left) > 0.999 && round > 0) break;
  }
  return {std::move(left), std::move(s)};
}

// What a few power iterations on A see outside of span v: x [B, cols, count], and its largest singular value under
// (I - u u^T) A [B], a lower bound of |(I - u u^T) A|, so that a right answer is never accused.
template <Dense D>
std::pair<ArrayOf<D>, ArrayOf<D>> probe(D& dense, const ArrayOf<D>& u, const ArrayOf<D>& v, int64_t count,
                                        int64_t turn) {
  using Array = ArrayOf<D>;
  Array x = dense.probe_gaussian(count, turn), y = dense.empty(dense.plan().rows, count);
  Array other = dense.empty(dense.plan().cols, count);
  const Array none = dense.zero_norms(count);
  for (int64_t iteration = 0; iteration < kProbeIterations; ++iteration) {
    dense.orthonormalise(x, v, none);
    Array z = dense.times_and_back(x, y, other).first;
    other = std::exchange(x, std::move(z));
  }
  dense.orthonormalise(x, v, none);
  dense.project_out(y, u);
  return {std::move(x), dense.largest_value(y)};
}

// From the span of v [B, cols, rank], orthonormal to about rounding: singular vectors and values of W with W V = U S,
// certified. `missed`: where to leave what the probe saw; null: no probe. `turn`: restarts so far.
template <Dense D>
std::vector<Candidate<ArrayOf<D>>> finish(D dense, ArrayOf<D> v, double tol, ArrayOf<D>* missed, int64_t turn) {
  using Array = ArrayOf<D>;
  const SvdPlan& plan = dense.plan();
  Found<Array> work;
  const int64_t rank = plan.rank;
  const auto count = [&](int64_t passes, int64_t width) {
    work.passes += passes;
    work.columns += passes * width;
  };

  Array right = std::move(v);
  dense.cholesky_qr(right);
  dense.cholesky_qr(right);
  Array y = dense.empty(plan.rows, rank);
  dense.times_exactly(right, y);
  count(1, rank);
  auto [left, s] = singular_vectors(dense, right, y);
  // The probe works on A, with singular vectors of A: short side, long side.
  const Array inner = right, outer = left, values = s;
  if (plan.transposed) {
    // A = W^T, so A V = U S says W^T U = V S. One more half step gives W V = U S, the form the certificate is for.
    right = dense.clone(outer);
    const Array z = dense.transposed_times_exactly(right);
    count(1, rank);
    std::tie(left, s) = singular_vectors(dense, right, z);
  }
  auto certificate = dense.certify(std::move(left), std::move(s), std::move(right), tol);
  count(1, rank);

  Array seen;
  const int64_t probes = missed ? std::min(kProbes, plan.cols - rank) : 0;
  if (probes > 0) {
    std::tie(*missed, seen) = probe(dense, outer, inner, probes, turn);
    count(2 * kProbeIterations, probes);
  }
  auto candidates = dense.report(certificate, values, probes > 0 ? &seen : nullptr, tol);
  for (auto& candidate : candidates) {
    candidate.found.passes = work.passes;
    candidate.found.columns = work.columns;
    if (candidate.missed) candidate.found.converged = false;
  }
  return candidates;
}

// How one matrix comes along from restart to restart.
struct Progress {
  double target;                                          // the residual that ends the iteration
  double best = std::numeric_limits<double>::infinity();  // smallest so far
  double now = best, before = best;                       // the last two
  int stalled = 0, rejected = 0;

  // True for a matrix that makes no progress: rounding allows no more (the caller may try again in float64).
  bool hopeless(double worst) {
    before = std::exchange(now, worst);
    if (!std::isfinite(worst)) return true;  // a factorisation failed
    stalled = worst < 0.8 * best ? 0 : stalled + 1;
    best = std::min(best, worst);
    return stalled >= 8 || rejected >= 4;
  }

  // Blocks until the target, if each of them goes on to gain what each of the last `blocks` did, a quarter more and one
  // besides, since a restart too early costs more than a block too many. All there is room for after a rejection.
  int64_t blocks_wanted(int64_t blocks, int64_t most) const {
    if (rejected > 0) return most;
    const double gain = std::log(before / now) / double(blocks), missing = std::log(now / target);
    if (!std::isfinite(gain) || !(gain * double(most) > missing)) return most;
    return std::clamp<int64_t>(int64_t(std::ceil(1.25 * missing / gain)) + 1, 1, most);
  }
};

// In words: V [cols, basis] grows by blocks of the Krylov space of A^T A, with Y = A V kept beside it. Rayleigh-Ritz on
// Y^T Y (float64) turns both to Ritz vectors; the best `keep` stay, the residuals of the worst become the next block,
// until the residuals are small. A matrix leaves the batch when its triplets are certified.
template <Dense D>
std::vector<Found<ArrayOf<D>>> block_lanczos(D dense, double tol, int64_t max_passes) {
  using Array = ArrayOf<D>;
  const SvdPlan plan = dense.plan();
  std::vector<Found<Array>> found(dense.batch());
  std::vector<int64_t> ids(dense.batch());  // position in the batch -> matrix
  std::iota(ids.begin(), ids.end(), 0);
  std::vector<Progress> progress(dense.batch(), Progress{0.8 * tol});

  Array V = dense.empty(plan.cols, plan.basis), Y = dense.empty(plan.rows, plan.basis);
  Array Z, norms;  // A^T (last block of Y), and the lengths in that block, if another follows before the restart
  int64_t width = 0, passes = 0, turn = 0;
  int64_t limit = plan.basis;  // where the next restart comes
  const auto append = [&](const Array& block) {
    dense.copy(dense.columns(V, width, plan.block), block);
    const Array y = dense.columns(Y, width, plan.block);
    width += plan.block;
    if (width + plan.block <= limit) {
      std::tie(Z, norms) = dense.times_and_back(block, y, dense.columns(V, width, plan.block));
      passes += 2;
    } else {
      dense.times(block, y);
      passes += 1;
    }
  };
  append(dense.orthonormal_gaussian());

  for (;;) {
    while (width + plan.block <= limit) {
      dense.orthonormalise(Z, dense.columns(V, 0, width), norms);
      append(Z);
    }

    ++turn;
    // Rayleigh-Ritz on all columns; the tail is the share of the newest block in each Ritz vector, to which the
    // residual is proportional in exact arithmetic.
    const auto [lambda, Q] = dense.gram_eigen(dense.columns(Y, 0, width));
    const auto worst = dense.largest_tails(Q, plan.block, plan.rank);  // [B, block] column numbers
    dense.rotate(V, Y, Q, width, plan.keep);
    width = plan.keep;
    // A^T y_i - lambda_i v_i
    Array R = dense.ritz_residuals(V, Y, lambda, worst, dense.columns(V, width, plan.block));
    passes += 1;
    dense.project_out(R,
                      dense.columns(V, 0, width));  // rounding has left a part of V in them; a true residual has none
    norms = dense.ritz_values(lambda, worst);       // |y_i|
    const std::vector<double> size = dense.relative_size(R, lambda, worst);  // the one read per restart

    std::vector<int64_t> candidates, staying;
    std::vector<bool> give_up(dense.batch());
    for (int64_t b = 0; b < dense.batch(); ++b) {
      give_up[b] = progress[ids[b]].hopeless(size[b]) || passes >= max_passes;
      (size[b] <= progress[ids[b]].target || give_up[b] ? candidates : staying).push_back(b);
    }
    if (!candidates.empty()) {
      Array missed;
      auto answers =
          finish(dense.only(candidates), dense.select(dense.columns(V, 0, plan.rank), candidates), tol, &missed, turn);
      for (size_t i = 0; i < candidates.size(); ++i) {
        const int64_t b = candidates[i];
        Found<Array>& result = found[ids[b]];
        const int64_t before = result.passes, columns = result.columns;  // of earlier, rejected certificates
        result = std::move(answers[i].found);
        result.passes += before;
        result.columns += columns;
        if (result.converged || give_up[b]) {
          result.passes += passes;
          result.columns += passes * plan.block;
        } else {  // certificate or probe objects: go on, more strictly, from what the probe saw
          Progress& state = progress[ids[b]];
          ++state.rejected;
          state.target /= 4;
          if (answers[i].missed) dense.insert(R, b, missed, int64_t(i));
          staying.push_back(b);
        }
      }
    }
    if (staying.empty()) return found;
    if (int64_t(staying.size()) < dense.batch()) {
      std::sort(staying.begin(), staying.end());
      std::vector<int64_t> next;
      for (const int64_t b : staying) next.push_back(ids[b]);
      ids = std::move(next);
      dense = dense.only(staying);
      V = dense.select(V, staying);
      Y = dense.select(Y, staying);
      R = dense.select(R, staying);
      norms = dense.select(norms, staying);
    }
    const int64_t most = (plan.basis - width) / plan.block, last = (limit - width) / plan.block;
    // A batch in lockstep makes whole cycles: how many blocks a matrix gets must not depend on how slow others are.
    const int64_t blocks = D::kLockstep ? most : progress[ids.front()].blocks_wanted(last, most);
    limit = width + blocks * plan.block;
    dense.orthonormalise(R, dense.columns(V, 0, width), norms);
    append(R);
  }
}

}  // namespace osora::core
