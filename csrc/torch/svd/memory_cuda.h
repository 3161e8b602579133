// SPDX-License-Identifier: Apache-2.0
// Device memory for csrc/cuda from torch's caching allocator, which gives freed bytes to work of the same stream only.
// Only in a build with CUDA.
#pragma once
#include <c10/cuda/CUDACachingAllocator.h>

#include <memory>

#include "cuda/svd/context.h"

namespace osora {

class TorchMemory : public cuda::Allocator {
 public:
  std::shared_ptr<void> allocate(size_t bytes) override {
    const auto owner = std::make_shared<at::DataPtr>(c10::cuda::CUDACachingAllocator::get()->allocate(bytes));
    return {owner, owner->get()};
  }
};

}  // namespace osora
