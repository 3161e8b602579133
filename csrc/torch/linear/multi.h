// SPDX-License-Identifier: Apache-2.0
// What differs from row to row where one batch holds many adapters: the scaling of h before the product with U, and
// the sum after it. Between them, and before, rows are all alike (linear_multi.cpp).
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

namespace osora {

// Inputs are checked (check_linear_multi) and on one device, but for `ranks`, which may be on the CPU. h, t, y [n, *]
// and index [n] are contiguous; S0, s and o in any strides, s and o also in 16 bits.

// t [2n, r] in h's dtype: h_i (S0 + s_a) in row i, h_i s_a in row n + i. Zeros beyond ranks[a] and for index -1.
at::Tensor multi_scale(const at::Tensor& h, const at::Tensor& S0, const at::Tensor& s,
                       const std::optional<at::Tensor>& ranks, const at::Tensor& index);
// y_i += o_a t_i + t_{n+i} in the accumulation dtype, rounded once. t [2n, d]. Rows of index -1 keep their bits.
void multi_combine(at::Tensor& y, const at::Tensor& t, const at::Tensor& o, const at::Tensor& index);

}  // namespace osora
