// SPDX-License-Identifier: Apache-2.0
// The linear layer for a few rows, as in decoding: two kernels that read W, U and V once and form no D. Pointers,
// sizes, a stream.
//
// All arrays are row-major and contiguous. Any size and alignment is right; whole 16-byte packs are fast, for x
// with W and for V by itself. No atomics: the same bits in every run and on every number of SMs. A row's result does
// not depend on the rows beside it, nor on how many there are.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "core/accumulate.h"

namespace osora::cuda {

using core::accumulate_t;

// Whose deltas a row takes: row i is of adapter index[i], -1 is the base model. An index outside [-1, count) reads
// nothing, and its row of y becomes NaN. (The operator refuses one where it can look.)
template <class T>
struct DecodeAdapters {
  const accumulate_t<T>*s0, *s, *o;  // [r], [count, r], [count, d]
  const int64_t* ranks;              // [count] or null; columns beyond an adapter's rank count as absent
  const int64_t* index;              // [n] or null: then every row is of adapter 0
  int64_t count;
};

// h = x V, summed in the accumulation type, rounded once.  x [n, k]; v [k, r], as it is stored; h [n, r].
template <class T>
void decode_shrink(const T* x, const T* v, T* h, int64_t n, int64_t k, int64_t r, cudaStream_t stream);

// y[i, :] = x_i W^T + bias + o_a * ((h_i (s0 + s_a)) U^T) + (h_i s_a) U^T with a the row's adapter; one sum in the
// accumulation type, rounded once.
// x [n, k]; w [d, k] or null (the adapter's branch alone); bias [d] or null; h [n, r]; u [d, r]; y [n, d]; 1 <= n <= 8.
template <class T>
void decode_expand(const T* x, const T* w, const T* bias, const T* h, const T* u, const DecodeAdapters<T>& adapters,
                   T* y, int64_t n, int64_t d, int64_t k, int64_t r, cudaStream_t stream);

}  // namespace osora::cuda
