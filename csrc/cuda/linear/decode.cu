// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "cuda/common/half.cuh"
#include "cuda/common/launch.h"
#include "cuda/common/layout.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/linear/decode.h"

namespace osora::cuda {
namespace {

// A block of the first kernel takes columns of V that fill a sector of 32 bytes, and all of its rows.
constexpr int kShrinkThreads = 512;
constexpr int kShrinkBytes = 32;
template <int N, class T>
constexpr int kShrinkLanes = kShrinkBytes / static_cast<int>(sizeof(T)) / N;

// A block of the second kernel is kTeams teams of kSlices warps. A team takes R rows of W; its threads share the
// columns. Constants: how a sum is cut must depend on neither the card nor the number of rows of x.
constexpr int kTeams = 2;
constexpr int kSlices = kThreads / kWarp / kTeams;
constexpr int kTeamThreads = kSlices * kWarp;

// blockIdx.x: column tile of V. blockIdx.y: X rows of x. Threads that hold the same columns take the rows of V in turn;
// their sums are joined within a warp, then warp by warp.
template <int N, int X, class T, class A>
__global__ void __launch_bounds__(kShrinkThreads, 2)
    decode_shrink_kernel(const T* __restrict__ x, const T* __restrict__ v, T* __restrict__ h, int64_t n, int64_t k,
                         int64_t r) {
  constexpr int kLanes = kShrinkLanes<N, T>, kGroups = kShrinkThreads / kLanes, kTile = kLanes * N;
  [[maybe_unused]] constexpr int kTurns = X == 1 ? 4 : 1;  // loads in flight; more of them spill with four rows of x
  A* const warps = dynamic_shared<A>();                    // [warps, X, kTile]
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int64_t column = int64_t{blockIdx.x} * kTile + lane * N, first = int64_t{blockIdx.y} * X;
  x += first * k;
  const int64_t rows = n - first;

  A sum[X * N] = {};
  if (column < r) {
#pragma unroll kTurns
    for (int64_t i = group; i < k; i += kGroups) {
      A b[N];
      load(v + i * r + column, b);
#pragma unroll
      for (int q = 0; q < X; ++q) {
        const A a = q < rows ? widen(x[q * k + i]) : A(0);
#pragma unroll
        for (int e = 0; e < N; ++e) sum[q * N + e] = multiply_add(a, b[e], sum[q * N + e]);
      }
    }
  }
  const Scattered mine = scatter_sum<X * N, kLanes>(sum);
  if (mine.owner) {
    A* const warp = warps + threadIdx.x / kWarp * (X * kTile);
#pragma unroll
    for (int m = 0; m < kScattered<X * N, kLanes>; ++m) {
      const int value = mine.first + m;
      warp[value / N * kTile + lane * N + value % N] = sum[m];
    }
  }
  __syncthreads();
  const int q = threadIdx.x / kTile, c = threadIdx.x % kTile;
  if (q < X && q < rows && int64_t{blockIdx.x} * kTile + c < r) {
    narrow(strided_sum(warps + threadIdx.x, kShrinkThreads / kWarp, X * kTile),
           h[(first + q) * r + int64_t{blockIdx.x} * kTile + c]);
  }
}

// A block per kTeams * R rows of W. Every thread adds up its share of x W^T, then of the adapter's branch, for R rows
// of W and X rows of x in the same R * X sums; they are joined within a warp, then over the team's warps.
// Rows beyond d or n are computed from the last one that exists, and not stored.
template <int N, int R, int X, class T, class A>
__global__ void __launch_bounds__(kThreads, X == 8 ? 3 : 4)
    decode_expand_kernel(const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ bias,
                         const T* __restrict__ h, const T* __restrict__ u, DecodeAdapters<T> adapters,
                         T* __restrict__ y, int n, int64_t d, int64_t k, int64_t r) {
  A* const warps = dynamic_shared<A>();  // [kTeams, kSlices, R, X]
  const int team = threadIdx.x / kTeamThreads;
  const int64_t first = (int64_t{blockIdx.x} * kTeams + team) * R;
  const int64_t last = first < d ? first : d - 1;  // of W and U, where this team has no row

  A sum[R * X] = {};
  if (w) {
#pragma unroll 1
    for (int64_t j = threadIdx.x % kTeamThreads * N; j < k; j += kTeamThreads * N) {
      A a[R][N];
      const T* from = w + last * k + j;  // one pointer that moves: a pointer per row would cost too many registers
#pragma unroll
      for (int q = 0; q < R; ++q) {
        load(from, a[q]);
        if (first + q + 1 < d) from += k;
      }
      from = x + j;
#pragma unroll
      for (int i = 0; i < X; ++i) {
        A b[N];
        load(from, b);
        if (i + 1 < n) from += k;
#pragma unroll
        for (int q = 0; q < R; ++q) {
#pragma unroll
          for (int e = 0; e < N; ++e) sum[q * X + i] = multiply_add(a[q][e], b[e], sum[q * X + i]);
        }
      }
    }
  }
  // A column of U per thread: r is small, and this way most threads have one.
#pragma unroll 1
  for (int64_t j = threadIdx.x % kTeamThreads; j < r; j += kTeamThreads) {
    A a[R];
    const T* from = u + last * r + j;
#pragma unroll
    for (int q = 0; q < R; ++q) {
      a[q] = widen(*from);
      if (first + q + 1 < d) from += r;
    }
    const A s0 = adapters.s0[j];
#pragma unroll
    for (int i = 0; i < X; ++i) {
      const int64_t adapter = i >= n ? -1 : adapters.index ? adapters.index[i] : 0;
      if (adapter < 0 || adapter >= adapters.count || (adapters.ranks && j >= adapters.ranks[adapter])) continue;
      const A s = adapters.s[adapter * r + j], b = widen(h[i * r + j]);
      const A both = b * (s0 + s), change = b * s;
      const A* scale = adapters.o + adapter * d + last;
#pragma unroll
      for (int q = 0; q < R; ++q) {
        sum[q * X + i] = multiply_add(a[q], multiply_add(*scale, both, change), sum[q * X + i]);
        if (first + q + 1 < d) ++scale;
      }
    }
  }

  const Scattered mine = scatter_sum<R * X, 1>(sum);
  if (mine.owner) {
#pragma unroll
    for (int m = 0; m < kScattered<R * X, 1>; ++m) {
      warps[threadIdx.x / kWarp * (R * X) + mine.first + m] = sum[m];
    }
  }
  __syncthreads();
  if (threadIdx.x >= kTeams * R * X) return;
  const int value = threadIdx.x % (R * X), i = value % X;
  const int64_t column = (int64_t{blockIdx.x} * kTeams + threadIdx.x / (R * X)) * R + value / X;
  if (i >= n || column >= d) return;
  A total = strided_sum(warps + threadIdx.x / (R * X) * (kSlices * R * X) + value, kSlices, R * X);
  if (bias) total += widen(bias[column]);
  const int64_t adapter = adapters.index ? adapters.index[i] : 0;
  if (adapter < -1 || adapter >= adapters.count) total = A(NAN);
  narrow(total, y[i * d + column]);
}

template <int N, int X, class T, class A = accumulate_t<T>>
void launch_shrink(const T* x, const T* v, T* h, int64_t n, int64_t k, int64_t r, cudaStream_t stream) {
  constexpr int kTile = kShrinkLanes<N, T> * N;
  launch(decode_shrink_kernel<N, X, T, A>, dim3(ceil_div(r, kTile), ceil_div(n, X)), dim3(kShrinkThreads),
         kShrinkThreads / kWarp * X * kTile * sizeof(A), stream, x, v, h, n, k, r);
}

template <int N, int R, int X, class T, class A = accumulate_t<T>>
void launch_expand(const T* x, const T* w, const T* bias, const T* h, const T* u, const DecodeAdapters<T>& adapters,
                   T* y, int64_t n, int64_t d, int64_t k, int64_t r, cudaStream_t stream) {
  launch(decode_expand_kernel<N, R, X, T, A>, dim3(ceil_div(d, kTeams * R)), dim3(kThreads),
         kTeams * kSlices * R * X * sizeof(A), stream, x, w, bias, h, u, adapters, y, static_cast<int>(n), d, k, r);
}

// Rows of W per team: more in flight where one row of x leaves the registers for it.
template <int N, class T>
void choose_expand(const T* x, const T* w, const T* bias, const T* h, const T* u, const DecodeAdapters<T>& adapters,
                   T* y, int64_t n, int64_t d, int64_t k, int64_t r, cudaStream_t stream) {
  if (n == 1) {
    launch_expand<N, 4, 1>(x, w, bias, h, u, adapters, y, n, d, k, r, stream);
  } else if (n <= 4) {
    launch_expand<N, 2, 4>(x, w, bias, h, u, adapters, y, n, d, k, r, stream);
  } else {
    launch_expand<N, 2, 8>(x, w, bias, h, u, adapters, y, n, d, k, r, stream);
  }
}

}  // namespace

template <class T>
void decode_shrink(const T* x, const T* v, T* h, int64_t n, int64_t k, int64_t r, cudaStream_t stream) {
  if (n == 0 || r == 0) return;
  const bool packed = r % kPerPack<T> == 0 && aligned(v);
  if (packed && n == 1) {
    launch_shrink<kPerPack<T>, 1>(x, v, h, n, k, r, stream);
  } else if (packed) {
    launch_shrink<kPerPack<T>, 4>(x, v, h, n, k, r, stream);
  } else if (n == 1) {
    launch_shrink<1, 1>(x, v, h, n, k, r, stream);
  } else {
    launch_shrink<1, 4>(x, v, h, n, k, r, stream);
  }
}

template <class T>
void decode_expand(const T* x, const T* w, const T* bias, const T* h, const T* u, const DecodeAdapters<T>& adapters,
                   T* y, int64_t n, int64_t d, int64_t k, int64_t r, cudaStream_t stream) {
  if (n == 0 || d == 0) return;
  if (k % kPerPack<T> == 0 && aligned(x, w)) {
    choose_expand<kPerPack<T>>(x, w, bias, h, u, adapters, y, n, d, k, r, stream);
  } else {
    choose_expand<1>(x, w, bias, h, u, adapters, y, n, d, k, r, stream);
  }
}

#define OSORA_INSTANTIATE_DECODE(T)                                                                                    \
  template void decode_shrink(const T*, const T*, T*, int64_t, int64_t, int64_t, cudaStream_t);                        \
  template void decode_expand(const T*, const T*, const T*, const T*, const T*, const DecodeAdapters<T>&, T*, int64_t, \
                              int64_t, int64_t, int64_t, cudaStream_t);
OSORA_INSTANTIATE_DECODE(double)
OSORA_INSTANTIATE_DECODE(float)
OSORA_INSTANTIATE_DECODE(__nv_bfloat16)
OSORA_INSTANTIATE_DECODE(__half)
#undef OSORA_INSTANTIATE_DECODE

}  // namespace osora::cuda
