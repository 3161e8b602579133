// SPDX-License-Identifier: Apache-2.0
// Sums across threads: the only place that talks to other lanes of a warp. Every order is fixed, so the same input
// gives the same bits whatever the scheduling.
#pragma once
#include <cuda_runtime.h>

namespace osora::cuda {

// The sum over a group of `lanes` neighbouring threads (a power of two, at most 32), in every one of them.
// All 32 threads of the warp must call it.
template <class A>
__device__ __forceinline__ A group_sum(A value, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

// values[0] + values[stride] + ... (count terms), in that order.
template <class A>
__device__ __forceinline__ A strided_sum(const A* values, int64_t count, int64_t stride) {
  A sum = 0;
#pragma unroll 4
  for (int64_t k = 0; k < count; ++k) sum += values[k * stride];
  return sum;
}

}  // namespace osora::cuda
