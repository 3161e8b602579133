// SPDX-License-Identifier: Apache-2.0
// The two products whose sums reach the gradients of s and o. On the CPU their bits do not depend on the number of
// threads, where torch's own may.
#pragma once
#include <ATen/core/Tensor.h>

namespace osora {

// h [n, r] = x V for x [n, k] and V [k, r] of one dtype, any strides: the tensor that is saved for the backward.
at::Tensor down_product(const at::Tensor& x, const at::Tensor& V);
// P [d, r] = dy^T h for dy [n, d] and h [n, r], summed over all rows in the accumulation dtype.
at::Tensor outer_sum(const at::Tensor& dy, const at::Tensor& h);

}  // namespace osora
