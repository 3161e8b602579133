// SPDX-License-Identifier: Apache-2.0
#include "torch/svd_cuda.h"

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "torch/svd_launch.h"

namespace osora {
namespace {

// Bytes from torch's caching allocator, which gives them to other work of the same stream only.
class TensorMemory : public cuda::Allocator {
 public:
  explicit TensorMemory(at::Device device) : options_(at::TensorOptions().device(device).dtype(at::kByte)) {}
  std::shared_ptr<void> allocate(size_t bytes) override {
    const auto memory = at::empty({static_cast<int64_t>(bytes)}, options_);
    return {memory.mutable_data_ptr(), [memory](void*) {}};
  }

 private:
  at::TensorOptions options_;
};

cuda::DenseOptions dense_options(at::ScalarType work, double tol, uint64_t seed) {
  cuda::DenseOptions options;
  options.float64_work = work == at::kDouble;
  options.tol = tol;
  options.seed = seed;
  return options;
}

}  // namespace

std::vector<core::Found<at::Tensor>> lanczos_cuda(const std::vector<at::Tensor>& weights, const core::SvdPlan& plan,
                                                  at::ScalarType work, double tol, uint64_t seed,
                                                  const std::vector<uint64_t>& keys, int64_t max_passes) {
  const auto device = weights.front().device();
  const c10::cuda::CUDAGuard guard(device);
  TensorMemory memory(device);
  return lanczos_launch(weights, plan, dense_options(work, tol, seed), keys, max_passes,
                        cuda::context(c10::cuda::getCurrentCUDAStream(), memory));
}

std::vector<core::Found<at::Tensor>> gram_cuda(const std::vector<at::Tensor>& weights, const core::SvdPlan& plan,
                                               at::ScalarType work, double tol, uint64_t seed,
                                               const std::vector<uint64_t>& keys) {
  const auto device = weights.front().device();
  const c10::cuda::CUDAGuard guard(device);
  TensorMemory memory(device);
  return gram_launch(weights, plan, dense_options(work, tol, seed), keys,
                     cuda::context(c10::cuda::getCurrentCUDAStream(), memory));
}

int64_t free_memory_cuda() {
  size_t free = 0, total = 0;
  C10_CUDA_CHECK(cudaMemGetInfo(&free, &total));
  const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(c10::cuda::current_device());
  constexpr size_t kAll = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
  return int64_t(free) + stats.reserved_bytes[kAll].current - stats.allocated_bytes[kAll].current;
}

}  // namespace osora
