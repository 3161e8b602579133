// SPDX-License-Identifier: Apache-2.0
// osora::truncated_svd as a function: check, choose, run core/lanczos.h or another method, hand out. On ATen, for
// tensors of any device; on csrc/cuda, for those on_card().
#pragma once
#include <ATen/core/Tensor.h>

#include <string>
#include <tuple>

namespace osora {

// A matrix of at most this many entries runs on one thread of a CPU, many side by side; a larger one uses every thread.
// The rule looks at the shape alone, so that there a matrix gives the same bits alone and in any batch.
constexpr int64_t kOneThreadEntries = int64_t{1} << 20;

// As the schema says.
using Decomposed = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                              at::Tensor, at::Tensor, at::Tensor>;
Decomposed truncated_svd(at::TensorList weights, int64_t rank, double tol, int64_t seed, at::IntArrayRef keys,
                         std::string method, int64_t max_memory);

}  // namespace osora
