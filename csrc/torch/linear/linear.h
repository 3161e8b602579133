// SPDX-License-Identifier: Apache-2.0
// What the linear operators with one adapter share.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

namespace osora {

// y[..., d] = x W^T + bias + h D^T for x [..., k], its rows [n, k] (as_rows), h [n, r], D [d, r]. With a D of zeros it
// has the bits of torch's own linear.
at::Tensor linear_plus(const at::Tensor& x, const at::Tensor& rows, const std::optional<at::Tensor>& weight,
                       const std::optional<at::Tensor>& bias, const at::Tensor& h, const at::Tensor& D);

}  // namespace osora
