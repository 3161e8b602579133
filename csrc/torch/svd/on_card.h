// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <ATen/core/Tensor.h>

namespace osora {

// Whether the code of csrc/cuda does the work on this weight. The emulator of the tests finds another file of this name
// before this one, so that all of decompose.cpp runs on a CPU as it does beside a card.
inline bool on_card([[maybe_unused]] const at::Tensor& weight) {
#ifdef OSORA_CUDA
  return weight.is_cuda();
#else
  return false;
#endif
}

}  // namespace osora
