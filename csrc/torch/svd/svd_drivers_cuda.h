// SPDX-License-Identifier: Apache-2.0
// cuSOLVER's SVD drivers on tensors. No CUDA header here; defined where the extension is built with CUDA.
#pragma once
#include <ATen/core/Tensor.h>

#include "core/svd_plan.h"

namespace osora {

// U [d, r], S [r], V [k, r] in the working dtype: what a driver gave, not certified.
struct Factors {
  at::Tensor U, S, V;
};

// weight: a finite CUDA matrix [d, k] of a supported float dtype; method: kGesvd .. kGesvdr.
// Throws std::invalid_argument where core::refuse_driver does, std::runtime_error where the driver fails.
Factors svd_driver_cuda(const at::Tensor& weight, core::SvdMethod method, int64_t rank);

}  // namespace osora
