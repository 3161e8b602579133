// SPDX-License-Identifier: Apache-2.0
// fold() of many layers in one call: one launch on a card, one parallel loop on a CPU. See schema.cpp.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "torch/common/checks.h"

namespace osora {

// What a fold takes, layer by layer: checked, contiguous, and S0, s, o already in the accumulation dtype.
struct FoldInputs {
  std::vector<at::Tensor> U, S0, s, o;
};

inline FoldInputs fold_inputs(at::TensorList U, at::TensorList S0, at::TensorList s, at::TensorList o) {
  FoldInputs layers;
  for (size_t k = 0; k < U.size(); ++k) {
    const auto exact = accumulate_type(U[k].scalar_type());
    layers.U.push_back(U[k].contiguous());
    layers.S0.push_back(S0[k].to(exact).contiguous());
    layers.s.push_back(s[k].to(exact).contiguous());
    layers.o.push_back(o[k].to(exact).contiguous());
  }
  return layers;
}

// On torch's current stream.
std::vector<at::Tensor> fold_many_cuda(const FoldInputs& layers);

}  // namespace osora
