// SPDX-License-Identifier: Apache-2.0
// Found before csrc/torch/svd/on_card.h: to the operator of the emulator every weight is one on a card.
#pragma once
#include <ATen/core/Tensor.h>

namespace osora {

inline bool on_card(const at::Tensor&) { return true; }

}  // namespace osora
