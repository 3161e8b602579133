// SPDX-License-Identifier: Apache-2.0
#include "torch/svd/svd_drivers_cuda.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "torch/svd/memory_cuda.h"
#include "torch/svd/svd_drivers_launch.h"

namespace osora {

Factors svd_driver_cuda(const at::Tensor& weight, core::SvdMethod method, int64_t rank) {
  const c10::cuda::CUDAGuard guard(weight.device());
  TorchMemory memory;
  return svd_driver_launch(weight, method, rank, cuda::context(c10::cuda::getCurrentCUDAStream(), memory));
}

}  // namespace osora
