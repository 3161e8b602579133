// SPDX-License-Identifier: Apache-2.0
// The fold of some rows by one thread: shared by fold.cu and fold_many.cu, whose results are therefore the same bits.
#pragma once
#include "cuda/common/half.cuh"
#include "cuda/common/layout.cuh"

namespace osora::cuda {

// start[e] = (s0 + s)[column + e] and shift[e] = s[column + e].
template <int N, class A>
__device__ __forceinline__ void load_scales(const A* s0, const A* s, int64_t column, bool packed, A (&start)[N],
                                            A (&shift)[N]) {
  load_vector(s0, column, packed, start);
  load_vector(s, column, packed, shift);
#pragma unroll
  for (int e = 0; e < N; ++e) start[e] += shift[e];
}

// d_out[i, j] = u[i, j] (o[i] (s0[j] + s[j]) + s[j]) for the N columns from `column`, and of the rows before `end`
// every step-th from `first`. A thread keeps its columns of s0 + s and s in registers and walks down the rows.
template <int N, class T, class A>
__device__ __forceinline__ void fold_rows(const T* __restrict__ u, const A* __restrict__ s0, const A* __restrict__ s,
                                          const A* __restrict__ o, T* __restrict__ d_out, int64_t r, int64_t column,
                                          bool packed_vectors, int64_t first, int64_t end, int64_t step) {
  A start[N], shift[N];
  load_scales(s0, s, column, packed_vectors, start, shift);
  for (int64_t i = first; i < end; i += step) {
    A x[N];
    load(u + i * r + column, x);
    const A scale = o[i];
#pragma unroll
    for (int e = 0; e < N; ++e) x[e] *= multiply_add(scale, start[e], shift[e]);
    store(x, d_out + i * r + column);
  }
}

}  // namespace osora::cuda
