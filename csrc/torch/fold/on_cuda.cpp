// SPDX-License-Identifier: Apache-2.0
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "torch/fold/fold.h"
#include "torch/fold/fold_launch.h"
#include "torch/fold/fold_many_launch.h"

namespace osora {

at::Tensor fold_cuda(const at::Tensor& U, const at::Tensor& S0, const at::Tensor& s, const at::Tensor& o) {
  const c10::cuda::CUDAGuard guard(U.device());
  return fold_launch(U, S0, s, o, c10::cuda::getCurrentCUDAStream());
}

std::tuple<at::Tensor, at::Tensor> fold_backward_cuda(const at::Tensor& U, const at::Tensor& P, const at::Tensor& S0,
                                                      const at::Tensor& s, const at::Tensor& o, bool need_s,
                                                      bool need_o) {
  const c10::cuda::CUDAGuard guard(U.device());
  return fold_backward_launch(U, P, S0, s, o, need_s, need_o, c10::cuda::getCurrentCUDAStream());
}

std::vector<at::Tensor> fold_many_cuda(const FoldInputs& layers) {
  const c10::cuda::CUDAGuard guard(layers.U.front().device());
  return fold_many_launch(layers, c10::cuda::getCurrentCUDAStream());
}

}  // namespace osora
