// SPDX-License-Identifier: Apache-2.0
// How a block of threads lies over the rows and columns of a matrix: shared by the kernels that are elementwise in it.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/half.cuh"

namespace osora::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kLog2MinLanes = 2;  // then a block has at most 64 groups

// How a block of kThreads lies over a matrix [d, r]: groups of `lanes` threads take a row each, a lane takes N
// neighbouring columns; lanes * N columns are one tile. 16-byte packs make N = kPerPack; N = 1 is right everywhere.
struct Layout {
  int log2_lanes;
  bool packed_vectors;  // vectors of a number per column can be read in packs as well
};

struct Place {
  int lanes, lane, groups, group;
  __device__ __forceinline__ explicit Place(Layout layout)
      : lanes(1 << layout.log2_lanes),
        lane(threadIdx.x & (lanes - 1)),
        groups(kThreads >> layout.log2_lanes),
        group(threadIdx.x >> layout.log2_lanes) {}
};

// values[e] = vector[first + e]; `packed` where 16-byte packs may be read.
template <int N, class A>
__device__ __forceinline__ void load_vector(const A* vector, int64_t first, bool packed, A (&values)[N]) {
  if (packed) {
    load(vector + first, values);
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) values[e] = vector[first + e];
  }
}

// On 16 bytes, what a pack needs.
template <class... Pointers>
bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// The fewest lanes that cover r columns with N each, within one warp.
template <int N>
Layout layout_for(int64_t r, bool packed_vectors) {
  int log2_lanes = kLog2MinLanes;
  while ((1 << log2_lanes) < kWarp && (int64_t{N} << log2_lanes) < r) ++log2_lanes;
  return {log2_lanes, packed_vectors};
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace osora::cuda
