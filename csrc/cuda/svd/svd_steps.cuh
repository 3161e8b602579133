// SPDX-License-Identifier: Apache-2.0
// One kernel in many guises: each step of svd_kernels.cu and svd_ritz.cu is a struct with one function, which says what
// a block of kThreads does with column j of matrix b.
#pragma once
#include <cmath>

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

}  // namespace osora::cuda
