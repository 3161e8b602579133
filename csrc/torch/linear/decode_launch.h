// SPDX-License-Identifier: Apache-2.0
// From tensors to the launchers of cuda/linear/decode.h: allocate, call. Shared by on_cuda.cpp and by the emulator of
// the tests. Inputs are checked, contiguous, and of the right dtypes: S0, s and o that of sums, ranks and index int64.
#pragma once
#include <ATen/ops/empty.h>

#include <tuple>

#include "core/accumulate.h"
#include "cuda/linear/decode.h"
#include "torch/common/cuda_number.h"
#include "torch/linear/decode.h"

namespace osora {

inline std::tuple<at::Tensor, at::Tensor> decode_launch(const DecodeInputs& in, cudaStream_t stream) {
  const int64_t n = in.x.size(0), k = in.x.size(1), d = in.U.size(0), r = in.U.size(1);
  auto h = at::empty({n, r}, in.x.options()), y = at::empty({n, d}, in.x.options());
  with_cuda_number(in.x.scalar_type(), [&](auto number) {
    using N = decltype(number);
    using T = typename N::type;
    using A = core::accumulate_t<T>;
    const auto integers = [](const std::optional<at::Tensor>& t) { return t ? t->const_data_ptr<int64_t>() : nullptr; };
    T* const h_out = N::write(h);
    T* const y_out = N::write(y);
    const cuda::DecodeAdapters<T> adapters{in.S0.const_data_ptr<A>(), in.s.const_data_ptr<A>(),
                                           in.o.const_data_ptr<A>(),  integers(in.ranks),
                                           integers(in.index),        in.s.dim() == 2 ? in.s.size(0) : 1};
    cuda::decode_shrink(N::read(in.x), N::read(in.V), h_out, n, k, r, stream);
    cuda::decode_expand(N::read(in.x), in.weight ? N::read(*in.weight) : nullptr, in.bias ? N::read(*in.bias) : nullptr,
                        static_cast<const T*>(h_out), N::read(in.U), adapters, y_out, n, d, k, r, stream);
  });
  return {y, h};
}

}  // namespace osora
