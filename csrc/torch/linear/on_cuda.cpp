// SPDX-License-Identifier: Apache-2.0
#include "torch/linear/on_cuda.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "torch/linear/decode_launch.h"
#include "torch/linear/multi_launch.h"

namespace osora {

std::tuple<at::Tensor, at::Tensor> decode_cuda(const DecodeInputs& inputs) {
  const c10::cuda::CUDAGuard guard(inputs.x.device());
  return decode_launch(inputs, c10::cuda::getCurrentCUDAStream());
}

at::Tensor multi_scale_cuda(const at::Tensor& h, const at::Tensor& S0, const at::Tensor& s,
                            const std::optional<at::Tensor>& ranks, const at::Tensor& index) {
  const c10::cuda::CUDAGuard guard(h.device());
  return multi_scale_launch(h, S0, s, ranks, index, c10::cuda::getCurrentCUDAStream());
}

void multi_combine_cuda(const at::Tensor& y, const at::Tensor& t, const at::Tensor& o, const at::Tensor& index) {
  const c10::cuda::CUDAGuard guard(y.device());
  multi_combine_launch(y, t, o, index, c10::cuda::getCurrentCUDAStream());
}

}  // namespace osora
