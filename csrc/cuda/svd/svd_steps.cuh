// SPDX-License-Identifier: Apache-2.0
// One kernel in many guises: each step of svd_kernels.cu and svd_ritz.cu is a struct with one function, which says what
// a block of kThreads does with column j of matrix b.
#pragma once
#include <cfloat>
#include <cmath>

#include "core/philox.h"
#include "cuda/common/half.cuh"
#include "cuda/common/launch.h"
#include "cuda/common/reduce.cuh"
#include "cuda/svd/svd_kernels.h"

namespace osora::cuda {

constexpr int kThreads = 256;
constexpr int kResidentBlocks = 4;  // on one SM: leaves a thread 64 registers

template <class Step>
__global__ void __launch_bounds__(kThreads, kResidentBlocks) columns_kernel(Step step, unsigned cols) {
  step(blockIdx.x / cols, blockIdx.x % cols);
}

template <class Step>
void for_columns(const Step& step, int64_t cols, int64_t batch, Stream stream) {
  if (cols * batch == 0) return;
  launch(columns_kernel<Step>, dim3(cols * batch), dim3(kThreads), block_reduce_bytes(kThreads), stream, step, cols);
}

// Matrices whose type is known.
template <class T>
struct View {
  T* data;
  int64_t rows, cols, stride;
  explicit View(const Matrices& p) : data(static_cast<T*>(p.data)), rows(p.rows), cols(p.cols), stride(p.stride) {}
  __device__ __forceinline__ T* column(int64_t b, int64_t j) const { return data + b * stride + j * rows; }
};

// call(double()) or call(float()).
template <class Call>
void with_type(Type type, Call call) {
  if (type == Type::kFloat64) {
    call(double());
  } else {
    call(float());
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// |column|, in every thread.
template <class T>
__device__ __forceinline__ double length(const T* column, int64_t rows) {
  double squares = 0;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) {
    const double x = column[i];
    squares += x * x;
  }
  return sqrt(block_reduce(squares, Sum()));
}

__device__ __forceinline__ double normal_number(const Random& random, int64_t b, int64_t index) {
  const auto pair = core::normal_pair(static_cast<uint64_t>(index / 2), random.keys[b], random.stream_number);
  return index % 2 ? pair.at[1] : pair.at[0];
}

// What is at the rounding level of a batch's columns, in every thread of its block; Noise says which columns are.
__device__ __forceinline__ double noise_level(const Noise& noise, int64_t b, int64_t cols) {
  double seen = noise.scale ? noise.scale[b] : 0;
  if (!noise.norms) return noise.level * seen;
  for (int64_t c = threadIdx.x; c < cols; c += kThreads) seen = Largest()(noise.norms[b * cols + c], seen);
  return noise.level * block_reduce(seen, Largest());
}

// Below the least normal float32 number a column is noise whatever the rule.
__device__ __forceinline__ double noise_limit(const Noise& noise, double level, int64_t b, int64_t j, int64_t cols) {
  return (noise.norms ? level * Largest()(noise.norms[b * cols + j], level) : level) + FLT_MIN;
}

}  // namespace osora::cuda
