// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <ATen/core/Tensor.h>

#ifdef OSORA_CUDA
#include <c10/cuda/CUDAGraphsC10Utils.h>
#endif

namespace osora {

// Whether a CUDA graph is being recorded on the current stream: kernels are noted down then, and run later.
inline bool is_capturing(const at::Tensor& t) {
#ifdef OSORA_CUDA
  return t.is_cuda() && c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
#else
  (void)t;
  return false;
#endif
}

}  // namespace osora
