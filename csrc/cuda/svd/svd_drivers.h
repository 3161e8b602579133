// SPDX-License-Identifier: Apache-2.0
// cuSOLVER's own SVD routines, called as NVIDIA's manual has it, to compare with. One matrix at a time; no certificate.
#pragma once
#include <cstdint>
#include <memory>

#include "core/svd_plan.h"
#include "cuda/svd/context.h"

namespace osora::cuda {

// Entry (i, j) stands at data[i * row_stride + j * column_stride], in numbers. The buffer may hold more columns.
struct Vectors {
  std::shared_ptr<void> data;
  int64_t row_stride = 1, column_stride = 0;
};

struct DriverFactors {
  Vectors u;                // [rows, rank]
  std::shared_ptr<void> s;  // [rank], descending; the buffer has room for cols
  Vectors v;                // [cols, rank]
};

// a: [rows, cols], column-major, leading dimension rows, on the device; it is destroyed. rows >= cols >= rank >= 1,
// method kGesvd .. kGesvdr, let pass by core::refuse_driver. T: float or double.
// Waits for the stream once, to read the driver's info; throws std::runtime_error where that is not 0.
template <class T>
DriverFactors svd_driver(Context& context, core::SvdMethod method, T* a, int64_t rows, int64_t cols, int64_t rank);

}  // namespace osora::cuda
