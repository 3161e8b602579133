// SPDX-License-Identifier: Apache-2.0
// From tensors to the launcher of cuda/fold/fold_many.h: allocate, list the pointers, call. Shared by
// fold_many_cuda.cpp and by the emulator of the tests.
#pragma once
#include <ATen/Dispatch.h>
#include <ATen/ops/empty_like.h>

#include <vector>

#include "cuda/fold/fold_many.h"
#include "torch/common/cuda_number.h"
#include "torch/fold/fold_many.h"

namespace osora {

inline std::vector<at::Tensor> fold_many_launch(const FoldInputs& layers, cudaStream_t stream) {
  std::vector<at::Tensor> D;
  const auto type = layers.U.front().scalar_type();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, type, "osora::fold_many", [&] {
    using T = CudaNumber<scalar_t>::type;
    using A = cuda::accumulate_t<T>;
    std::vector<cuda::FoldLayer<T>> table;
    for (size_t k = 0; k < layers.U.size(); ++k) {
      const auto& U = layers.U[k];
      D.push_back(at::empty_like(U));
      table.push_back({reinterpret_cast<const T*>(U.const_data_ptr<scalar_t>()), layers.S0[k].const_data_ptr<A>(),
                       layers.s[k].const_data_ptr<A>(), layers.o[k].const_data_ptr<A>(),
                       reinterpret_cast<T*>(D.back().mutable_data_ptr<scalar_t>()), U.size(0), U.size(1)});
    }
    cuda::fold_many(table.data(), static_cast<int64_t>(table.size()), stream);
  });
  return D;
}

}  // namespace osora
