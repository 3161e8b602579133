// SPDX-License-Identifier: Apache-2.0
// Every product of the SVD on ATen shows its result here before it is used. Nothing is done to it: the tests put a
// header of their own before this one, for a machine that rounds otherwise (tests/rounding).
#pragma once
#include <ATen/core/Tensor.h>

namespace osora {

// result [.., n, m] = 2^exponent left [.., n, k] right [.., k, m], or has it in a sum.
inline void rounded(const at::Tensor& /*result*/, const at::Tensor& /*left*/, const at::Tensor& /*right*/,
                    int /*exponent*/ = 0) {}

}  // namespace osora
