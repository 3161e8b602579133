// SPDX-License-Identifier: Apache-2.0
// The fold D = U * (o (S0 + s) + s) and its gradient on a GPU: pointers, sizes, a stream; no torch.
//
// All arrays are row-major and contiguous. Any d, r >= 0 and any alignment are right; 16-byte aligned arrays and an r
// of whole 16-byte packs (r % 8 == 0 for 16-bit factors) are fast. No atomics: the result is the same bits in every
// run, on every number of SMs.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "core/accumulate.h"

namespace osora::cuda {

using core::accumulate_t;

// d_out[i, j] = u[i, j] * (o[i] (s0[j] + s[j]) + s[j]), computed in the accumulation type, rounded once.
// u, d_out [d, r]; s0, s [r]; o [d].
template <class T>
void fold(const T* u, const accumulate_t<T>* s0, const accumulate_t<T>* s, const accumulate_t<T>* o, T* d_out,
          int64_t d, int64_t r, cudaStream_t stream);

// Rows of the scratch `partial` of fold_backward: [fold_backward_blocks(d), r].
int64_t fold_backward_blocks(int64_t d);

// ds[j] = sum_i (1 + o[i]) u[i, j] p[i, j]          [r]
// d_o[i] = sum_j u[i, j] (s0[j] + s[j]) p[i, j]     [d]
// u, p [d, r]. Either result may be null: then it is not computed. Without ds, `partial` may be null as well.
template <class T>
void fold_backward(const T* u, const accumulate_t<T>* p, const accumulate_t<T>* s0, const accumulate_t<T>* s,
                   const accumulate_t<T>* o, accumulate_t<T>* ds, accumulate_t<T>* d_o, accumulate_t<T>* partial,
                   int64_t d, int64_t r, cudaStream_t stream);

}  // namespace osora::cuda
