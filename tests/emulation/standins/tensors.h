// SPDX-License-Identifier: Apache-2.0
// CPU tensors whose numbers lie in the device memory of the stand-ins.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>

#include <numeric>

#include "memory.h"

namespace osora::standins {

// Contiguous, all NaN. The memory goes back with the last tensor that uses it.
inline at::Tensor empty_on_device(at::IntArrayRef shape, at::ScalarType type) {
  const int64_t numbers = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
  auto memory = allocate(static_cast<size_t>(numbers) * at::elementSize(type));
  void* const data = memory.get();
  return at::from_blob(data, shape, [memory](void*) mutable { memory.reset(); }, at::TensorOptions().dtype(type));
}

inline at::Tensor to_device(const at::Tensor& t) { return empty_on_device(t.sizes(), t.scalar_type()).copy_(t); }

}  // namespace osora::standins
