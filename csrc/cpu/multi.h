// SPDX-License-Identifier: Apache-2.0
// The two loops of many adapters in one batch over raw CPU memory. Row-major, contiguous, no torch.
//
// T is the dtype of h, t and y; A (float, or double for double) that of every other number and of the arithmetic.
// index[i] is the adapter of row i, or -1 for none; whoever calls has checked that it is in range.
#pragma once
#include <algorithm>
#include <cstdint>

namespace osora::cpu {

// For rows i in [begin, end) of n:  t[i] = h[i] (S0 + s_a)  and  t[n + i] = h[i] s_a,  a = index[i].
// Zeros beyond the adapter's rank and for rows without one: written, not multiplied, so that a NaN in h cannot pass.
// h [n, r]; s0 [r]; s [A, r]; ranks [A] or null, where every adapter has rank r; t [2n, r].
template <class T, class A>
void multi_scale_rows(const T* h, const A* s0, const A* s, const int64_t* ranks, const int64_t* index, T* t,
                      int64_t begin, int64_t end, int64_t n, int64_t r) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t a = index[i];
    const int64_t rank = a < 0 ? 0 : ranks ? std::clamp<int64_t>(ranks[a], 0, r) : r;
    const T* row = h + i * r;
    T *scaled = t + i * r, *changed = t + (n + i) * r;
    if (rank > 0) {
      const A* delta = s + a * r;
      for (int64_t j = 0; j < rank; ++j) {
        const A value = static_cast<A>(row[j]);
        scaled[j] = static_cast<T>(value * (s0[j] + delta[j]));
        changed[j] = static_cast<T>(value * delta[j]);
      }
    }
    std::fill(scaled + rank, scaled + r, T(0));
    std::fill(changed + rank, changed + r, T(0));
  }
}

// y[i] += o_a * t[i] + t[n + i] for the numbers [begin, end) of y [n, d] taken as one array; computed in A, rounded
// once. Rows without an adapter are not touched. o [A, d]; t [2n, d].
template <class T, class A>
void multi_combine(T* y, const T* t, const A* o, const int64_t* index, int64_t begin, int64_t end, int64_t n,
                   int64_t d) {
  while (begin < end) {
    const int64_t i = begin / d, stop = std::min(end, (i + 1) * d), count = stop - begin;
    if (index[i] >= 0) {
      T* const target = y + begin;
      const T *const scaled = t + begin, *const changed = t + n * d + begin;
      const A* const scale = o + index[i] * d + (begin - i * d);
      for (int64_t j = 0; j < count; ++j) {
        const A change = scale[j] * static_cast<A>(scaled[j]) + static_cast<A>(changed[j]);
        target[j] = static_cast<T>(static_cast<A>(target[j]) + change);
      }
    }
    begin = stop;
  }
}

}  // namespace osora::cpu
