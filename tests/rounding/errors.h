// SPDX-License-Identifier: Apache-2.0
// Rounding errors as another order of summation, another width of registers or another BLAS would make them.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

namespace osora::rounding {

// To each number of result [.., n, m], which is 2^exponent left [.., n, k] right [.., k, m] or a sum with it, an error
// is added: up to 2 units of its last place, and up to epsilon / 2 |row of left| |column of right|. As a root mean
// square that is 0.3 of the product; k terms of random signs lose sqrt(1/24) = 0.2 of it when they are summed one after
// the other. The error is a function of the seed and of the result's bits: the same product has the same error in any
// batch, thread and repeat.
void add_errors(uint64_t seed, const at::Tensor& result, const at::Tensor& left, const at::Tensor& right,
                int exponent = 0);

}  // namespace osora::rounding
