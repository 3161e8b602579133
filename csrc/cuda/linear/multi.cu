// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>

#include "cuda/common/half.cuh"
#include "cuda/common/launch.h"
#include "cuda/common/layout.cuh"
#include "cuda/linear/multi.h"

namespace osora::cuda {
namespace {

constexpr int kMaxMultiBlocks = 1024;

// blockIdx.y: column tile. blockIdx.x: rows, strided. A group of lanes takes a row of h and writes two rows of t.
template <int N, class T, class A>
__global__ void __launch_bounds__(kThreads)
    multi_scale_kernel(const T* __restrict__ h, const A* __restrict__ s0, const A* __restrict__ s,
                       const int64_t* __restrict__ ranks, const int64_t* __restrict__ index, T* __restrict__ t,
                       int64_t n, int64_t r, int64_t adapters, Layout layout) {
  const Place at(layout);
  const int64_t column = (int64_t{blockIdx.y} * at.lanes + at.lane) * N;
  if (column >= r) return;
  A start[N];
  load_vector(s0, column, layout.packed_vectors, start);
  for (int64_t i = int64_t{blockIdx.x} * at.groups + at.group; i < n; i += int64_t{gridDim.x} * at.groups) {
    const int64_t a = index[i];
    A both[N], change[N];
    if (a >= 0 && a < adapters) {
      A x[N], shift[N];
      load(h + i * r + column, x);
      load_vector(s + a * r, column, layout.packed_vectors, shift);
      const int64_t rank = ranks ? ranks[a] : r;
#pragma unroll
      for (int e = 0; e < N; ++e) {  // chosen, not multiplied by zero: what lies beyond a rank may be anything
        const bool present = column + e < rank;
        both[e] = present ? x[e] * (start[e] + shift[e]) : A(0);
        change[e] = present ? x[e] * shift[e] : A(0);
      }
    } else {
      const A fill = a == -1 ? A(0) : A(NAN);
#pragma unroll
      for (int e = 0; e < N; ++e) both[e] = change[e] = fill;
    }
    store(both, t + i * r + column);
    store(change, t + (n + i) * r + column);
  }
}

// blockIdx.y: column tile. blockIdx.x: rows, strided. A group of lanes takes a row of y; rows of the base are skipped.
template <int N, class T, class A>
__global__ void __launch_bounds__(kThreads)
    multi_combine_kernel(T* __restrict__ y, const T* __restrict__ t, const A* __restrict__ o,
                         const int64_t* __restrict__ index, int64_t n, int64_t d, int64_t adapters, Layout layout) {
  const Place at(layout);
  const int64_t column = (int64_t{blockIdx.y} * at.lanes + at.lane) * N;
  if (column >= d) return;
  for (int64_t i = int64_t{blockIdx.x} * at.groups + at.group; i < n; i += int64_t{gridDim.x} * at.groups) {
    const int64_t a = index[i];
    if (a == -1) continue;
    A sum[N];
    if (a >= 0 && a < adapters) {
      A both[N], change[N], scale[N];
      load(y + i * d + column, sum);
      load(t + i * d + column, both);
      load(t + (n + i) * d + column, change);
      load_vector(o + a * d, column, layout.packed_vectors, scale);
#pragma unroll
      for (int e = 0; e < N; ++e) sum[e] += multiply_add(scale[e], both[e], change[e]);
    } else {
#pragma unroll
      for (int e = 0; e < N; ++e) sum[e] = A(NAN);
    }
    store(sum, y + i * d + column);
  }
}

template <int N>
dim3 grid_for(Layout layout, int64_t rows, int64_t columns) {
  const int64_t tiles = ceil_div(columns, N << layout.log2_lanes);
  const int64_t row_blocks = ceil_div(rows, kThreads >> layout.log2_lanes);
  return dim3(std::min(row_blocks, std::max<int64_t>(1, kMaxMultiBlocks / tiles)), tiles);
}

template <int N, class T, class A = accumulate_t<T>>
void launch_scale(const T* h, const A* s0, const A* s, const int64_t* ranks, const int64_t* index, T* t, int64_t n,
                  int64_t r, int64_t adapters, cudaStream_t stream) {
  const auto layout = layout_for<N>(r, aligned(s0, s));
  launch(multi_scale_kernel<N, T, A>, grid_for<N>(layout, n, r), dim3(kThreads), 0, stream, h, s0, s, ranks, index, t,
         n, r, adapters, layout);
}

template <int N, class T, class A = accumulate_t<T>>
void launch_combine(T* y, const T* t, const A* o, const int64_t* index, int64_t n, int64_t d, int64_t adapters,
                    cudaStream_t stream) {
  const auto layout = layout_for<N>(d, aligned(o));
  launch(multi_combine_kernel<N, T, A>, grid_for<N>(layout, n, d), dim3(kThreads), 0, stream, y, t, o, index, n, d,
         adapters, layout);
}

}  // namespace

template <class T>
void multi_scale(const T* h, const accumulate_t<T>* s0, const accumulate_t<T>* s, const int64_t* ranks,
                 const int64_t* index, T* t, int64_t n, int64_t r, int64_t adapters, cudaStream_t stream) {
  if (n == 0 || r == 0) return;
  if (r % kPerPack<T> == 0 && aligned(h, t)) {
    launch_scale<kPerPack<T>>(h, s0, s, ranks, index, t, n, r, adapters, stream);
  } else {
    launch_scale<1>(h, s0, s, ranks, index, t, n, r, adapters, stream);
  }
}

template <class T>
void multi_combine(T* y, const T* t, const accumulate_t<T>* o, const int64_t* index, int64_t n, int64_t d,
                   int64_t adapters, cudaStream_t stream) {
  if (n == 0 || d == 0) return;
  if (d % kPerPack<T> == 0 && aligned(y, t)) {
    launch_combine<kPerPack<T>>(y, t, o, index, n, d, adapters, stream);
  } else {
    launch_combine<1>(y, t, o, index, n, d, adapters, stream);
  }
}

#define OSORA_INSTANTIATE_MULTI(T)                                                                                    \
  template void multi_scale(const T*, const accumulate_t<T>*, const accumulate_t<T>*, const int64_t*, const int64_t*, \
                            T*, int64_t, int64_t, int64_t, cudaStream_t);                                             \
  template void multi_combine(T*, const T*, const accumulate_t<T>*, const int64_t*, int64_t, int64_t, int64_t,        \
                              cudaStream_t);
OSORA_INSTANTIATE_MULTI(double)
OSORA_INSTANTIATE_MULTI(float)
OSORA_INSTANTIATE_MULTI(__nv_bfloat16)
OSORA_INSTANTIATE_MULTI(__half)
#undef OSORA_INSTANTIATE_MULTI

}  // namespace osora::cuda
