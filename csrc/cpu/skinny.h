// SPDX-License-Identifier: Apache-2.0
// A matrix in float32 times a few columns, and its transpose times a few columns, at the speed of the arithmetic:
// general BLAS libraries reach a third to a half of it for 8 to 32 columns.
#pragma once
#include <cstdint>

namespace osora::cpu {

// a: rows [m, k], lda apart; n: a multiple of 8. m is meant to be small enough for a to stay in the cache between the
// two calls.
struct Skinny {
  // y [m, n] = alpha a x with x [k, n]; x and y row-major without gaps.
  void (*times)(const float* a, int64_t m, int64_t k, int64_t lda, const float* x, int64_t n, float alpha, float* y);
  // z [n, k] (+)= alpha (a^T y)^T with y [m, n]; y and z row-major without gaps. `add`: z is added to, else written.
  void (*back)(const float* a, int64_t m, int64_t k, int64_t lda, const float* y, int64_t n, float alpha, bool add,
               float* z);
  // out [m, n] = base + a x for a [m, k] with a few columns and x [k, n] as pack_strips() leaves it; rows of a, base
  // and out lie lda, ldbase and ldout apart. Any n.
  void (*plus)(const float* a, int64_t m, int64_t k, int64_t lda, const float* x, int64_t n, const float* base,
               int64_t ldbase, float* out, int64_t ldout);
  // The largest magnitude of a[count] and the sum of its squares in float64 are put to largest and squares.
  void (*scan)(const float* a, int64_t count, float* largest, double* squares);
};

// The best one for this processor, or null where there is none: the caller then asks BLAS.
const Skinny* skinny();

// x^T [n, k], its rows ldx apart, for Skinny::plus: x in strips of kStrip columns, [k, kStrip] each, zero beyond n.
// Writes strips [begin, end) of strips(n) to their places in `packed`.
constexpr int64_t kStrip = 32;
constexpr int64_t strips(int64_t n) { return (n + kStrip - 1) / kStrip; }
void pack_strips(const float* x, int64_t n, int64_t k, int64_t ldx, int64_t begin, int64_t end, float* packed);

// One per translation unit, compiled for its instruction set.
extern const Skinny skinny_avx2, skinny_avx512;

}  // namespace osora::cpu
