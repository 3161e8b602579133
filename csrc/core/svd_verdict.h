// SPDX-License-Identifier: Apache-2.0
// What rounding hides from a truncated SVD, and the verdict on an answer: the same for every method, device and
// attempt. Derived in docs/svd.md, "The rounding floor".
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace osora::core {

// A sum of roundings, each independent and of mean zero, exceeds this many times its root mean square with a
// probability of 2 exp(-8^2 / 2) = 3e-14 (Higham and Mary, SIAM J. Sci. Comput. 41, 2019).
constexpr double kSafety = 8;

// Of W [d, k], in units of sigma_1: the root mean square by which products in an arithmetic of this epsilon (the
// distance from 1 to the next number), and the rounding of U, S and V, move |W^T u - sigma v|.
inline double rounding_noise(int64_t d, int64_t k, double epsilon) {
  return epsilon / 2 * (std::sqrt(double(d)) + std::sqrt(double(k)) + 3);
}

// The same with certainty. A singular value at or below it is zero to rounding: a matrix that this arithmetic cannot
// tell from W has 0 in its place.
inline double rounding_floor(int64_t d, int64_t k, double epsilon) { return kSafety * rounding_noise(d, k, epsilon); }

// The verdict on the triplets of one matrix.
struct Verdict {
  std::vector<double> residuals;  // rho_i: over sigma_i above the floor, over the floor below it
  double floor = 0;               // in the units of sigma
  bool certified = false;         // rho_i <= tol above the floor, and <= 1 below it
  // Some below the floor are above the noise, and off by more than tol of the floor: nothing promises them, but an
  // arithmetic finer than that of the factors can still mend them.
  bool can_be_finer = false;
};

// sizes[i] = |W^T u_i - sigma_i v_i| and sigma[i], descending, in one unit; `floor` and `noise` over sigma_1.
inline Verdict verdict(const double* sizes, const double* sigma, int64_t rank, double floor, double noise, double tol) {
  Verdict made;
  made.floor = floor * sigma[0];
  made.certified = true;
  for (int64_t i = 0; i < rank; ++i) {
    const bool above = sigma[i] > made.floor;
    const double rho = sizes[i] / std::max({sigma[i], made.floor, 1e-300});
    made.residuals.push_back(rho);
    if (!(rho <= (above ? tol : 1.0))) made.certified = false;  // also for NaN
    if (!above && sigma[i] > noise * sigma[0] && !(rho <= tol)) made.can_be_finer = true;
  }
  return made;
}

// Whether the probe has seen a larger triplet: more than sigma_r by a thousandth, or than the floor where sigma_r is
// below it, and by more than the product's own rounding.
inline bool has_missed(double seen, double smallest, double floor) {
  return !(seen <= std::max(smallest, floor) * (1 + 1e-3) + floor);
}

}  // namespace osora::core
