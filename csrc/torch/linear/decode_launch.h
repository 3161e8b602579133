// SPDX-License-Identifier: Apache-2.0
// From tensors to the launchers of cuda/linear/decode.h: allocate, call. Shared by on_cuda.cpp and by the emulator of
// the tests. Inputs are checked, contiguous, and of the right dtypes: S0, s and o that of sums, ranks and index int64.
#pragma once
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include <tuple>

#include "cuda/linear/decode.h"
#include "torch/common/cuda_number.h"
#include "torch/linear/decode.h"

namespace osora {

inline std::tuple<at::Tensor, at::Tensor> decode_launch(const DecodeInputs& in, cudaStream_t stream) {
  const int64_t n = in.x.size(0), k = in.x.size(1), d = in.U.size(0), r = in.U.size(1);
  auto h = at::empty({n, r}, in.x.options()), y = at::empty({n, d}, in.x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, in.x.scalar_type(), "osora::linear", [&] {
    using T = CudaNumber<scalar_t>::type;
    using A = cuda::accumulate_t<T>;
    const auto numbers = [](const at::Tensor& t) { return reinterpret_cast<const T*>(t.const_data_ptr<scalar_t>()); };
    const auto integers = [](const std::optional<at::Tensor>& t) { return t ? t->const_data_ptr<int64_t>() : nullptr; };
    T* const h_out = reinterpret_cast<T*>(h.mutable_data_ptr<scalar_t>());
    T* const y_out = reinterpret_cast<T*>(y.mutable_data_ptr<scalar_t>());
    const cuda::DecodeAdapters<T> adapters{in.S0.const_data_ptr<A>(), in.s.const_data_ptr<A>(),
                                           in.o.const_data_ptr<A>(),  integers(in.ranks),
                                           integers(in.index),        in.s.dim() == 2 ? in.s.size(0) : 1};
    cuda::decode_shrink(numbers(in.x), numbers(in.V), h_out, n, k, r, stream);
    cuda::decode_expand(numbers(in.x), in.weight ? numbers(*in.weight) : nullptr, in.bias ? numbers(*in.bias) : nullptr,
                        static_cast<const T*>(h_out), numbers(in.U), adapters, y_out, n, d, k, r, stream);
  });
  return {y, h};
}

}  // namespace osora
