// SPDX-License-Identifier: Apache-2.0
// From tensors to the launcher of cuda/fold/fold_many.h: allocate, list the pointers, call. Shared by
// on_cuda.cpp and by the emulator of the tests.
#pragma once
#include <ATen/ops/empty_like.h>

#include <vector>

#include "core/accumulate.h"
#include "cuda/fold/fold_many.h"
#include "torch/common/cuda_number.h"
#include "torch/fold/fold_many.h"

namespace osora {

inline std::vector<at::Tensor> fold_many_launch(const FoldInputs& layers, cudaStream_t stream) {
  std::vector<at::Tensor> D;
  const auto type = layers.U.front().scalar_type();
  with_cuda_number(type, [&](auto number) {
    using N = decltype(number);
    using T = typename N::type;
    using A = core::accumulate_t<T>;
    std::vector<cuda::FoldLayer<T>> table;
    for (size_t k = 0; k < layers.U.size(); ++k) {
      const auto& U = layers.U[k];
      D.push_back(at::empty_like(U));
      table.push_back({N::read(U), layers.S0[k].const_data_ptr<A>(), layers.s[k].const_data_ptr<A>(),
                       layers.o[k].const_data_ptr<A>(), N::write(D.back()), U.size(0), U.size(1)});
    }
    cuda::fold_many(table.data(), static_cast<int64_t>(table.size()), stream);
  });
  return D;
}

}  // namespace osora
