// SPDX-License-Identifier: Apache-2.0
// Which way the linear operator takes: a function of sizes alone, decided before anything is allocated.
#pragma once
#include <cstdint>

namespace osora::core {

enum class LinearPlan {
  kSplit,   // D = fold, then products of the library: h = x V, y = bias + h D^T, y += x W^T
  kDecode,  // the two kernels of cuda/linear/decode.h: W, U and V are read once, and no D is formed
};

// Rows of x up to which a product with W is a matter of reading W: 8 multiply-adds per number read are below what a
// card computes meanwhile, and tensor cores (the library's) bring nothing.
constexpr int64_t kMaxDecodeRows = 8;

// x [n, k], W [d, k], V [k, r]. `row_major`: W (if there is one), U and V are contiguous, so that the kernels can
// stream them. They take any other size and alignment.
constexpr LinearPlan linear_plan(int64_t n, int64_t d, int64_t k, int64_t r, bool cuda, bool row_major) {
  const bool empty = n == 0 || d == 0 || k == 0 || r == 0;
  return cuda && row_major && !empty && n <= kMaxDecodeRows ? LinearPlan::kDecode : LinearPlan::kSplit;
}

// Whether dx = dy W + (dy D) V^T is cheaper as dy (W + D V^T), whose sum is made for this one product: d k r
// multiply-adds, and W read and written once, against n r (d + k), with dy read and dx written once more. It never
// takes more memory than half of dy and dx.
constexpr bool sums_weight_first(int64_t n, int64_t d, int64_t k) { return n * (d + k) > 2 * d * k; }

}  // namespace osora::core
