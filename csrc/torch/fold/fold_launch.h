// SPDX-License-Identifier: Apache-2.0
// From tensors to the launchers of cuda/fold/fold.h: allocate, call. Shared by on_cuda.cpp and by the emulator of the
// tests, so that the tests run this code too. Inputs are checked, contiguous, and of the right dtypes.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <tuple>

#include "core/accumulate.h"
#include "cuda/fold/fold.h"
#include "torch/common/cuda_number.h"

namespace osora {

inline at::Tensor fold_launch(const at::Tensor& U, const at::Tensor& S0, const at::Tensor& s, const at::Tensor& o,
                              cudaStream_t stream) {
  auto D = at::empty_like(U);
  with_cuda_number(U.scalar_type(), [&](auto number) {
    using N = decltype(number);
    using T = typename N::type;
    using A = core::accumulate_t<T>;
    cuda::fold(N::read(U), S0.const_data_ptr<A>(), s.const_data_ptr<A>(), o.const_data_ptr<A>(), N::write(D), U.size(0),
               U.size(1), stream);
  });
  return D;
}

inline std::tuple<at::Tensor, at::Tensor> fold_backward_launch(const at::Tensor& U, const at::Tensor& P,
                                                               const at::Tensor& S0, const at::Tensor& s,
                                                               const at::Tensor& o, bool need_s, bool need_o,
                                                               cudaStream_t stream) {
  const int64_t d = U.size(0), r = U.size(1);
  auto ds = at::empty({need_s ? r : 0}, P.options()), d_o = at::empty({need_o ? d : 0}, P.options());
  auto partial = at::empty({need_s ? cuda::fold_backward_blocks(d) : 0, r}, P.options());
  with_cuda_number(U.scalar_type(), [&](auto number) {
    using N = decltype(number);
    using T = typename N::type;
    using A = core::accumulate_t<T>;
    cuda::fold_backward(N::read(U), P.const_data_ptr<A>(), S0.const_data_ptr<A>(), s.const_data_ptr<A>(),
                        o.const_data_ptr<A>(), need_s ? ds.mutable_data_ptr<A>() : nullptr,
                        need_o ? d_o.mutable_data_ptr<A>() : nullptr, need_s ? partial.mutable_data_ptr<A>() : nullptr,
                        d, r, stream);
  });
  return {ds, d_o};
}

}  // namespace osora
