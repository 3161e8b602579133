// SPDX-License-Identifier: Apache-2.0
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "torch/fold/fold_many_launch.h"

namespace osora {

std::vector<at::Tensor> fold_many_cuda(const FoldInputs& layers) {
  const c10::cuda::CUDAGuard guard(layers.U.front().device());
  return fold_many_launch(layers, c10::cuda::getCurrentCUDAStream());
}

}  // namespace osora
