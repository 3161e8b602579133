// SPDX-License-Identifier: Apache-2.0
// From tensors to the launchers of cuda/linear/multi.h: allocate, call. Shared by on_cuda.cpp and by the emulator of
// the tests. Inputs are checked, contiguous, and of the right dtypes: S0, s and o that of sums, ranks and index int64.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>

#include "core/accumulate.h"
#include "cuda/linear/multi.h"
#include "torch/common/cuda_number.h"

namespace osora {

inline at::Tensor multi_scale_launch(const at::Tensor& h, const at::Tensor& S0, const at::Tensor& s,
                                     const std::optional<at::Tensor>& ranks, const at::Tensor& index,
                                     cudaStream_t stream) {
  const int64_t n = h.size(0), r = h.size(1);
  auto t = at::empty({2 * n, r}, h.options());
  with_cuda_number(h.scalar_type(), [&](auto number) {
    using N = decltype(number);
    using T = typename N::type;
    using A = core::accumulate_t<T>;
    cuda::multi_scale(N::read(h), S0.const_data_ptr<A>(), s.const_data_ptr<A>(),
                      ranks ? ranks->const_data_ptr<int64_t>() : nullptr, index.const_data_ptr<int64_t>(), N::write(t),
                      n, r, s.size(0), stream);
  });
  return t;
}

inline void multi_combine_launch(const at::Tensor& y, const at::Tensor& t, const at::Tensor& o, const at::Tensor& index,
                                 cudaStream_t stream) {
  with_cuda_number(y.scalar_type(), [&](auto number) {
    using N = decltype(number);
    using T = typename N::type;
    cuda::multi_combine(N::write(y), N::read(t), o.const_data_ptr<core::accumulate_t<T>>(),
                        index.const_data_ptr<int64_t>(), y.size(0), y.size(1), o.size(0), stream);
  });
}

}  // namespace osora
