// SPDX-License-Identifier: Apache-2.0
// From a tensor to a driver of cuda/svd/svd_drivers.h and back: scale, lay out, call. Shared by on_cuda.cpp and by the
// emulator of the tests.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <utility>

#include "core/svd_drivers_limits.h"
#include "cuda/svd/svd_drivers.h"
#include "torch/common/checks.h"
#include "torch/common/numbers.h"
#include "torch/svd/on_cuda.h"
#include "torch/svd/scale.h"

namespace osora {

// A tensor over memory of a cuda::Allocator, which lives as long as the tensor.
inline at::Tensor over(const std::shared_ptr<void>& memory, at::IntArrayRef sizes, at::IntArrayRef strides,
                       const at::TensorOptions& options) {
  return at::from_blob(memory.get(), sizes, strides, [memory](void*) {}, options, options.device());
}

inline Factors svd_driver_launch(const at::Tensor& weight, core::SvdMethod method, int64_t rank,
                                 cuda::Context& context) {
  const int64_t d = weight.size(0), k = weight.size(1), rows = std::max(d, k), cols = std::min(d, k);
  const auto options = weight.options().dtype(accumulate_type(weight.scalar_type()));
  core::refuse_driver(method, d, k, rank, int64_t(options.dtype().itemsize()));

  const int exponent = scale_exponent(weight);
  // A [rows, cols] column-major is A^T [cols, rows] as torch lays it out: W^T, or W itself where A = W^T.
  const auto memory = context.memory->allocate(size_t(rows * cols) * options.dtype().itemsize());
  auto scaled = over(memory, {cols, rows}, {rows, 1}, options);
  scaled.copy_(d < k ? weight : weight.t());
  scale_by(scaled, -exponent);

  cuda::DriverFactors found;
  with_wide_number(scaled.scalar_type(), [&](auto number) {
    found = cuda::svd_driver(context, method, scaled.mutable_data_ptr<decltype(number)>(), rows, cols, rank);
  });
  const auto vectors = [&](const cuda::Vectors& from, int64_t length) {
    return over(from.data, {length, rank}, {from.row_stride, from.column_stride}, options)
        .clone(at::MemoryFormat::Contiguous);  // the driver's own buffer may be many times as large
  };
  auto S = scale_by(over(found.s, {rank}, {1}, options).clone(), exponent);
  auto U = vectors(found.u, rows), V = vectors(found.v, cols);
  if (d < k) std::swap(U, V);
  return {U, S, V};
}

}  // namespace osora
