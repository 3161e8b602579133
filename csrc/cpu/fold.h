// SPDX-License-Identifier: Apache-2.0
// The two small loops of the operator over raw CPU memory. Row-major, contiguous, no torch.
//
// T is the dtype of U and D; A (float, or double for double) that of every other number and of each sum.
#pragma once
#include <cmath>
#include <cstdint>

namespace osora::cpu {

// D[i, j] = U[i, j] * (o[i] (S0[j] + s[j]) + s[j]) for rows [begin, end); computed in A, rounded once.
// `start` [r] holds S0 + s. With o = s = 0 every D is an exact zero: the adapted layer starts as its base.
template <class T, class A>
void fold_rows(const T* u, const A* start, const A* s, const A* o, T* out, int64_t begin, int64_t end, int64_t r) {
  for (int64_t i = begin; i < end; ++i) {
    const T* row = u + i * r;
    T* target = out + i * r;
    const A scale = o[i];
    for (int64_t j = 0; j < r; ++j) target[j] = static_cast<T>(static_cast<A>(row[j]) * (scale * start[j] + s[j]));
  }
}

// For rows [begin, end):  do[i] = sum_j U P (S0 + s)[j]   and   ds[j] += sum_i (1 + o[i]) U P.
// ds must start at zero; either pointer may be null.
template <class T, class A>
void fold_backward_rows(const T* u, const A* p, const A* start, const A* o, A* ds, A* d_o, int64_t begin, int64_t end,
                        int64_t r) {
  for (int64_t i = begin; i < end; ++i) {
    const T* row = u + i * r;
    const A* grad = p + i * r;
    if (d_o) {
      A sum = 0;
      for (int64_t j = 0; j < r; ++j) sum += static_cast<A>(row[j]) * grad[j] * start[j];
      d_o[i] = sum;
    }
    if (ds) {
      const A scale = A(1) + o[i];
      for (int64_t j = 0; j < r; ++j) ds[j] += scale * static_cast<A>(row[j]) * grad[j];
    }
  }
}

}  // namespace osora::cpu
