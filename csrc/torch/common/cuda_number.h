// SPDX-License-Identifier: Apache-2.0
// The same for csrc/cuda, which has CUDA's names for the 16-bit numbers; both are the same bits.
#pragma once
#include <ATen/core/Tensor.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "torch/common/numbers.h"

namespace osora {

// The numbers of tensors of T, as a kernel takes them.
template <class T, class Name = T>
struct CudaNumber {
  using type = Name;
  static const Name* read(const at::Tensor& t) { return reinterpret_cast<const Name*>(t.const_data_ptr<T>()); }
  static Name* write(const at::Tensor& t) { return reinterpret_cast<Name*>(t.mutable_data_ptr<T>()); }
};

inline CudaNumber<double> cuda_number(double) { return {}; }
inline CudaNumber<float> cuda_number(float) { return {}; }
inline CudaNumber<c10::BFloat16, __nv_bfloat16> cuda_number(c10::BFloat16) { return {}; }
inline CudaNumber<c10::Half, __half> cuda_number(c10::Half) { return {}; }

// call(CudaNumber of a tensor's dtype)
template <class Call>
void with_cuda_number(at::ScalarType type, Call call) {
  with_number(type, [&](auto number) { call(cuda_number(number)); });
}

}  // namespace osora
