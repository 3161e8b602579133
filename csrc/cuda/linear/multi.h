// SPDX-License-Identifier: Apache-2.0
// Many adapters in one batch on a GPU: the two elementwise steps around the product with U. Pointers, sizes, a stream.
//
// Row i of the batch belongs to adapter index[i]; -1 is the base model. Adapters share U, V and S0, so one product
// t U^T serves all of them: scale makes t from h, combine adds the product to y.
//
// An index outside [-1, adapters) reads nothing: its row becomes NaN. (The operator refuses one where it can look.)
// All arrays are row-major and contiguous; any size and alignment is right. As in fold/fold.h, whole packs are fast.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "core/accumulate.h"

namespace osora::cuda {

using core::accumulate_t;

// With a = index[i]:  t[i, j] = h[i, j] (s0[j] + s[a, j])  and  t[n + i, j] = h[i, j] s[a, j], rounded once each; zeros
// where a is -1, and in columns j >= ranks[a], which an adapter of smaller rank does not have.
// h [n, r]; s0 [r]; s [adapters, r]; ranks [adapters] or null; index [n]; t [2 n, r].
template <class T>
void multi_scale(const T* h, const accumulate_t<T>* s0, const accumulate_t<T>* s, const int64_t* ranks,
                 const int64_t* index, T* t, int64_t n, int64_t r, int64_t adapters, cudaStream_t stream);

// With a = index[i]:  y[i, j] += o[a, j] t[i, j] + t[n + i, j], summed in the accumulation type, rounded once. A row
// whose a is -1 keeps its bits.
// y [n, d], in place; t [2 n, d]; o [adapters, d]; index [n].
template <class T>
void multi_combine(T* y, const T* t, const accumulate_t<T>* o, const int64_t* index, int64_t n, int64_t d,
                   int64_t adapters, cudaStream_t stream);

}  // namespace osora::cuda
