// SPDX-License-Identifier: Apache-2.0
// Sums and extremes across threads: the only place that talks to other lanes of a warp. Every order is fixed, so the
// same input gives the same bits whatever the scheduling.
#pragma once
#include <cuda_runtime.h>

#include "cuda/launch.h"

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

// join(join(...), ...) over all threads of the block (whole warps), in every one of them. `join` is commutative. Takes
// block_reduce_bytes(threads) of the dynamic shared memory, from its begin.
constexpr int block_reduce_bytes(int threads) { return threads / 32 * 8; }

template <class Join>
__device__ __forceinline__ double block_reduce(double value, Join join) {
  double* const warps = dynamic_shared<double>();
  for (int distance = 16; distance > 0; distance /= 2) {
    value = join(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = warps[0];
  for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) value = join(value, warps[warp]);
  __syncthreads();  // the next reduction writes over them
  return value;
}

struct Sum {
  __device__ __forceinline__ double operator()(double a, double b) const { return a + b; }
};
// A NaN is larger than everything: it must not get lost.
struct Largest {
  __device__ __forceinline__ double operator()(double a, double b) const { return a > b || a != a ? a : b; }
};
struct Smallest {
  __device__ __forceinline__ double operator()(double a, double b) const { return a < b || a != a ? a : b; }
};

}  // namespace osora::cuda
