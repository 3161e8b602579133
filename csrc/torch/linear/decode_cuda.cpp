// SPDX-License-Identifier: Apache-2.0
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "torch/linear/decode_launch.h"

namespace osora {

std::tuple<at::Tensor, at::Tensor> decode_cuda(const DecodeInputs& inputs) {
  const c10::cuda::CUDAGuard guard(inputs.x.device());
  return decode_launch(inputs, c10::cuda::getCurrentCUDAStream());
}

}  // namespace osora
