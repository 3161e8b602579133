// SPDX-License-Identifier: Apache-2.0
// Found before csrc/torch/svd/rounding.h: a machine that rounds otherwise.
#pragma once
#include <ATen/core/Tensor.h>

namespace osora {

// result, which is or holds 2^exponent left right, gets rounding errors of the seed that round_by() has set.
void rounded(const at::Tensor& result, const at::Tensor& left, const at::Tensor& right, int exponent = 0);

}  // namespace osora
