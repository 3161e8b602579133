// SPDX-License-Identifier: Apache-2.0
// The fold D = U * (o (S0 + s) + s) and its gradient, as functions other glue may call. See schema.cpp.
#pragma once
#include <ATen/core/Tensor.h>

#include <tuple>

namespace osora {

// Inputs checked by whoever calls: any strides, 16-bit deltas allowed, CPU or CUDA.
at::Tensor fold(const at::Tensor& U, const at::Tensor& S0, const at::Tensor& s, const at::Tensor& o);
std::tuple<at::Tensor, at::Tensor> fold_backward(const at::Tensor& U, const at::Tensor& P, const at::Tensor& S0,
                                                 const at::Tensor& s, const at::Tensor& o, bool need_s, bool need_o);

// One device each: inputs contiguous, and S0, s, o, P already in the accumulation dtype.
// Rows [begin, end) of D, with start = S0 + s; called by the thread that computes them.
void fold_rows_cpu(const at::Tensor& U, const at::Tensor& start, const at::Tensor& s, const at::Tensor& o,
                   const at::Tensor& D, int64_t begin, int64_t end);
at::Tensor fold_cpu(const at::Tensor& U, const at::Tensor& S0, const at::Tensor& s, const at::Tensor& o);
std::tuple<at::Tensor, at::Tensor> fold_backward_cpu(const at::Tensor& U, const at::Tensor& P, const at::Tensor& S0,
                                                     const at::Tensor& s, const at::Tensor& o, bool need_s,
                                                     bool need_o);
at::Tensor fold_cuda(const at::Tensor& U, const at::Tensor& S0, const at::Tensor& s, const at::Tensor& o);
std::tuple<at::Tensor, at::Tensor> fold_backward_cuda(const at::Tensor& U, const at::Tensor& P, const at::Tensor& S0,
                                                      const at::Tensor& s, const at::Tensor& o, bool need_s,
                                                      bool need_o);

}  // namespace osora
