// SPDX-License-Identifier: Apache-2.0
// The CUDA name of a torch number type; both are the same bits.
#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace osora {

template <class T>
struct CudaNumber {
  using type = T;
};
template <>
struct CudaNumber<c10::BFloat16> {
  using type = __nv_bfloat16;
};
template <>
struct CudaNumber<c10::Half> {
  using type = __half;
};

}  // namespace osora
