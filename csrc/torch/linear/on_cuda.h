// SPDX-License-Identifier: Apache-2.0
// The kernels of cuda/linear on torch's current stream. All tensors are on one card, checked and contiguous; S0, s and
// o have the dtype of sums, ranks and index are int64. No CUDA header here.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "torch/linear/decode.h"

namespace osora {

// -> y [n, d], h [n, r] in x's dtype.
std::tuple<at::Tensor, at::Tensor> decode_cuda(const DecodeInputs& inputs);

// h [n, r], S0 [r], s [A, r], ranks [A] or none, index [n] -> t [2n, r] in h's dtype.
at::Tensor multi_scale_cuda(const at::Tensor& h, const at::Tensor& S0, const at::Tensor& s,
                            const std::optional<at::Tensor>& ranks, const at::Tensor& index);
// y [n, d] in place; t [2n, d] in y's dtype, o [A, d], index [n].
void multi_combine_cuda(const at::Tensor& y, const at::Tensor& t, const at::Tensor& o, const at::Tensor& index);

}  // namespace osora
