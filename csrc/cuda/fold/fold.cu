// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/common/half.cuh"
#include "cuda/common/launch.h"
#include "cuda/common/layout.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/fold/fold.h"
#include "cuda/fold/fold_rows.cuh"

namespace osora::cuda {
namespace {

// Rows one block sums. A constant, and not a share of the GPU: partial sums must not depend on the number of SMs.
constexpr int kRows = 64;
static_assert(kRows % (kThreads >> kLog2MinLanes) == 0, "every group makes the same number of turns");
// Blocks of the backward kernel on one SM: leaves it 64 registers. Left to itself, the compiler spills to get at 32.
constexpr int kResidentBlocks = 4;
constexpr int kMaxFoldBlocks = 1024;
constexpr int kFinishColumns = 32;

// blockIdx.y: column tile. blockIdx.x: rows, strided.
template <int N, class T, class A>
__global__ void __launch_bounds__(kThreads)
    fold_kernel(const T* __restrict__ u, const A* __restrict__ s0, const A* __restrict__ s, const A* __restrict__ o,
                T* __restrict__ d_out, int64_t d, int64_t r, Layout layout) {
  const Place at(layout);
  const int64_t column = (int64_t{blockIdx.y} * at.lanes + at.lane) * N;
  if (column >= r) return;
  fold_rows<N>(u, s0, s, o, d_out, r, column, layout.packed_vectors, int64_t{blockIdx.x} * at.groups + at.group, d,
               int64_t{gridDim.x} * at.groups);
}

// One block per kRows rows, one pass over u and p. Tile by tile of columns: a lane adds up its columns over its rows
// (for ds) and its part of each row (for d_o). The block's column sums go to partial[block, :], its row sums are done.
template <int N, class T, class A>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    fold_backward_kernel(const T* __restrict__ u, const A* __restrict__ p, const A* __restrict__ s0,
                         const A* __restrict__ s, const A* __restrict__ o, A* __restrict__ d_o, A* __restrict__ partial,
                         int64_t d, int64_t r, Layout layout) {
  A* const columns = dynamic_shared<A>();      // [groups, tile]
  A* const row_sums = columns + kThreads * N;  // [kRows], each entry written and read by one thread alone
  const Place at(layout);
  const int tile = at.lanes * N;
  const int64_t first_row = int64_t{blockIdx.x} * kRows;

  if (at.lane == 0) {
    for (int k = at.group; k < kRows; k += at.groups) row_sums[k] = 0;
  }
  for (int64_t first = 0; first < r; first += tile) {
    const int64_t column = first + at.lane * N;
    A start[N] = {}, shift[N] = {}, sum[N] = {};
    if (column < r) load_scales(s0, s, column, layout.packed_vectors, start, shift);

    // kRows is a multiple of the groups: every lane of a warp makes the same number of turns and reaches group_sum.
#pragma unroll 2
    for (int k = at.group; k < kRows; k += at.groups) {
      const int64_t i = first_row + k;
      A row = 0;
      if (i < d && column < r) {
        A x[N], y[N];
        load(u + i * r + column, x);
        load(p + i * r + column, y);
        const A scale = A(1) + o[i];
#pragma unroll
        for (int e = 0; e < N; ++e) {
          const A product = x[e] * y[e];
          sum[e] = multiply_add(scale, product, sum[e]);
          row = multiply_add(product, start[e], row);
        }
      }
      if (d_o) {
        row = group_sum(row, at.lanes);
        if (at.lane == 0) row_sums[k] += row;
      }
    }

    if (partial) {
      store(sum, columns + at.group * tile + at.lane * N);
      __syncthreads();
      const int j = threadIdx.x;  // a tile has at most kThreads columns
      if (j < tile && first + j < r) {
        partial[blockIdx.x * r + first + j] = strided_sum(columns + j, at.groups, tile);
      }
      __syncthreads();  // the next tile writes over these columns
    }
  }
  if (d_o && at.lane == 0) {
    for (int k = at.group; k < kRows && first_row + k < d; k += at.groups) d_o[first_row + k] = row_sums[k];
  }
}

// ds[j] = sum_b partial[b, j]. A block owns kFinishColumns columns; each of its slices of threads adds every
// slices-th row, then the slices are added in order.
template <class A>
__global__ void __launch_bounds__(kThreads)
    fold_backward_finish_kernel(const A* __restrict__ partial, A* __restrict__ ds, int64_t blocks, int64_t r) {
  constexpr int kSlices = kThreads / kFinishColumns;
  A* const slices = dynamic_shared<A>();  // [kSlices, kFinishColumns]
  const int column = threadIdx.x % kFinishColumns, slice = threadIdx.x / kFinishColumns;
  const int64_t j = int64_t{blockIdx.x} * kFinishColumns + column;
  A sum = 0;
  if (j < r && slice < blocks) {
    sum = strided_sum(partial + slice * r + j, (blocks - slice + kSlices - 1) / kSlices, kSlices * r);
  }
  slices[threadIdx.x] = sum;
  __syncthreads();
  if (slice == 0 && j < r) ds[j] = strided_sum(slices + column, kSlices, kFinishColumns);
}

template <int N, class T, class A = accumulate_t<T>>
void launch_fold(const T* u, const A* s0, const A* s, const A* o, T* d_out, int64_t d, int64_t r, cudaStream_t stream) {
  const auto layout = layout_for<N>(r, aligned(s0, s));
  const int64_t tiles = ceil_div(r, N << layout.log2_lanes), row_blocks = ceil_div(d, kThreads >> layout.log2_lanes);
  const int64_t most = std::max<int64_t>(1, kMaxFoldBlocks / tiles);
  launch(fold_kernel<N, T, A>, dim3(std::min(row_blocks, most), tiles), dim3(kThreads), 0, stream, u, s0, s, o, d_out,
         d, r, layout);
}

template <int N, class T, class A = accumulate_t<T>>
void launch_fold_backward(const T* u, const A* p, const A* s0, const A* s, const A* o, A* d_o, A* partial, int64_t d,
                          int64_t r, cudaStream_t stream) {
  const auto layout = layout_for<N>(r, aligned(s0, s));
  launch(fold_backward_kernel<N, T, A>, dim3(fold_backward_blocks(d)), dim3(kThreads),
         (kThreads * N + kRows) * sizeof(A), stream, u, p, s0, s, o, d_o, partial, d, r, layout);
}

}  // namespace

template <class T>
void fold(const T* u, const accumulate_t<T>* s0, const accumulate_t<T>* s, const accumulate_t<T>* o, T* d_out,
          int64_t d, int64_t r, cudaStream_t stream) {
  if (d == 0 || r == 0) return;
  if (r % kPerPack<T> == 0 && aligned(u, d_out)) {
    launch_fold<kPerPack<T>>(u, s0, s, o, d_out, d, r, stream);
  } else {
    launch_fold<1>(u, s0, s, o, d_out, d, r, stream);
  }
}

int64_t fold_backward_blocks(int64_t d) { return ceil_div(d, kRows); }

template <class T>
void fold_backward(const T* u, const accumulate_t<T>* p, const accumulate_t<T>* s0, const accumulate_t<T>* s,
                   const accumulate_t<T>* o, accumulate_t<T>* ds, accumulate_t<T>* d_o, accumulate_t<T>* partial,
                   int64_t d, int64_t r, cudaStream_t stream) {
  using A = accumulate_t<T>;
  if (!ds) partial = nullptr;
  if (d > 0 && (d_o || (ds && r > 0))) {
    if (r % kPerPack<T> == 0 && aligned(u, p)) {
      launch_fold_backward<kPerPack<T>>(u, p, s0, s, o, d_o, partial, d, r, stream);
    } else {
      launch_fold_backward<1>(u, p, s0, s, o, d_o, partial, d, r, stream);
    }
  }
  if (ds && r > 0) {
    launch(fold_backward_finish_kernel<A>, dim3(ceil_div(r, kFinishColumns)), dim3(kThreads), kThreads * sizeof(A),
           stream, partial, ds, fold_backward_blocks(d), r);
  }
}

#define OSORA_INSTANTIATE_FOLD(T)                                                                                    \
  template void fold(const T*, const accumulate_t<T>*, const accumulate_t<T>*, const accumulate_t<T>*, T*, int64_t,  \
                     int64_t, cudaStream_t);                                                                         \
  template void fold_backward(const T*, const accumulate_t<T>*, const accumulate_t<T>*, const accumulate_t<T>*,      \
                              const accumulate_t<T>*, accumulate_t<T>*, accumulate_t<T>*, accumulate_t<T>*, int64_t, \
                              int64_t, cudaStream_t);
OSORA_INSTANTIATE_FOLD(double)
OSORA_INSTANTIATE_FOLD(float)
OSORA_INSTANTIATE_FOLD(__nv_bfloat16)
OSORA_INSTANTIATE_FOLD(__half)
#undef OSORA_INSTANTIATE_FOLD

}  // namespace osora::cuda
