// SPDX-License-Identifier: Apache-2.0
// The products that several linear operators share.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

namespace osora {

// P[d, r] = dy^T h, summed over all rows in the accumulation dtype. 16-bit on the CPU: a block of rows at a time is
// widened, so that no float32 copy of dy ever exists.
at::Tensor outer_sum(const at::Tensor& dy, const at::Tensor& h);

// y[..., d] = x W^T + bias + h D^T for x [..., k], its rows [n, k] (as_rows), h [n, r], D [d, r]. With a D of zeros it
// has the bits of torch's own linear.
at::Tensor linear_plus(const at::Tensor& x, const at::Tensor& rows, const std::optional<at::Tensor>& weight,
                       const std::optional<at::Tensor>& bias, const at::Tensor& h, const at::Tensor& D);

}  // namespace osora
