// SPDX-License-Identifier: Apache-2.0
// From tensors to the launchers of cuda/fold/fold.h: allocate, call. Shared by on_cuda.cpp and by the emulator of the
// tests, so that the tests run this code too. Inputs are checked, contiguous, and of the right dtypes.
#pragma once
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <tuple>

#include "cuda/fold/fold.h"
#include "torch/common/cuda_number.h"

namespace osora {

inline at::Tensor fold_launch(const at::Tensor& U, const at::Tensor& S0, const at::Tensor& s, const at::Tensor& o,
                              cudaStream_t stream) {
  auto D = at::empty_like(U);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, U.scalar_type(), "osora::fold", [&] {
    using T = CudaNumber<scalar_t>::type;
    using A = cuda::accumulate_t<T>;
    cuda::fold(reinterpret_cast<const T*>(U.const_data_ptr<scalar_t>()), S0.const_data_ptr<A>(), s.const_data_ptr<A>(),
               o.const_data_ptr<A>(), reinterpret_cast<T*>(D.mutable_data_ptr<scalar_t>()), U.size(0), U.size(1),
               stream);
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
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, U.scalar_type(), "osora::fold_backward", [&] {
    using T = CudaNumber<scalar_t>::type;
    using A = cuda::accumulate_t<T>;
    cuda::fold_backward(reinterpret_cast<const T*>(U.const_data_ptr<scalar_t>()), P.const_data_ptr<A>(),
                        S0.const_data_ptr<A>(), s.const_data_ptr<A>(), o.const_data_ptr<A>(),
                        need_s ? ds.mutable_data_ptr<A>() : nullptr, need_o ? d_o.mutable_data_ptr<A>() : nullptr,
                        need_s ? partial.mutable_data_ptr<A>() : nullptr, d, r, stream);
  });
  return {ds, d_o};
}

}  // namespace osora
