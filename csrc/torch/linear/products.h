// SPDX-License-Identifier: Apache-2.0
// Products with a narrow matrix, where we are faster than torch's own, or steadier: on the CPU the bits of what reaches
// the gradients of s and o do not depend on the number of threads.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

namespace osora {

// h [n, r] = x V for x [n, k] and V [k, r] of one dtype, any strides: the tensor that is saved for the backward.
at::Tensor down_product(const at::Tensor& x, const at::Tensor& V);
// P [d, r] = dy^T h for dy [n, d] and h [n, r], summed over all rows in the accumulation dtype.
at::Tensor outer_sum(const at::Tensor& dy, const at::Tensor& h);

// W + D V^T for W [d, k], D [d, r] and V [k, r], in W's layout. Nothing where we have no fast way: not float32 on the
// CPU, or a W with gaps.
std::optional<at::Tensor> summed_weight(const at::Tensor& W, const at::Tensor& D, const at::Tensor& V);

}  // namespace osora
