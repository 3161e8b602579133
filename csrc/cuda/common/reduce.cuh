// SPDX-License-Identifier: Apache-2.0
// Sums and extremes across threads: the only place that talks to other lanes of a warp. Every order is fixed, so the
// same input gives the same bits whatever the scheduling.
#pragma once
#include <cuda_runtime.h>

#include "cuda/common/launch.h"

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

// Many sums at once, over the threads of a warp that stand kLeast, 2 kLeast, ... apart (a power of two). Each step
// halves the values a thread still has to pass on, so that 32 sums of 32 numbers take 31 shuffles and not 160. A sum is
// joined in the order of group_sum, whatever kCount is.
//
// values[0 ... kScattered<kCount, kLeast>) of a thread become the sums of the values `first`, first + 1, ...;
// where there are more threads than values, some hold a copy and `owner` is true for one of them. kCount is a power of
// two.
struct Scattered {
  int first;
  bool owner;
};
template <int kCount, int kLeast>
constexpr int kScattered = kCount > 32 / kLeast ? kCount / (32 / kLeast) : 1;

template <int kCount, int kLeast, int kDistance = 16, class A, int kSize>
__device__ __forceinline__ Scattered scatter_sum(A (&values)[kSize]) {
  static_assert(kCount > 0 && kCount <= kSize && (kCount & (kCount - 1)) == 0);
  if constexpr (kDistance < kLeast) {
    return {0, true};
  } else if constexpr (kCount == 1) {
    values[0] += __shfl_xor_sync(0xffffffffu, values[0], kDistance);
    const Scattered rest = scatter_sum<1, kLeast, kDistance / 2>(values);
    return {0, rest.owner && (threadIdx.x & kDistance) == 0};
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = threadIdx.x & kDistance;
#pragma unroll
    for (int e = 0; e < kHalf; ++e) {
      const A kept = upper ? values[kHalf + e] : values[e], given = upper ? values[e] : values[kHalf + e];
      values[e] = kept + __shfl_xor_sync(0xffffffffu, given, kDistance);
    }
    const Scattered rest = scatter_sum<kHalf, kLeast, kDistance / 2>(values);
    return {rest.first + (upper ? kHalf : 0), rest.owner};
  }
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
