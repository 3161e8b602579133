// SPDX-License-Identifier: Apache-2.0
#include "torch/svd/on_cuda.h"

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "torch/svd/memory_cuda.h"
#include "torch/svd/svd_drivers_launch.h"
#include "torch/svd/svd_launch.h"

namespace osora {
namespace {

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
  const c10::cuda::CUDAGuard guard(weights.front().device());
  TorchMemory memory;
  return lanczos_launch(weights, plan, dense_options(work, tol, seed), keys, max_passes,
                        cuda::context(c10::cuda::getCurrentCUDAStream(), memory));
}

std::vector<core::Found<at::Tensor>> gram_cuda(const std::vector<at::Tensor>& weights, const core::SvdPlan& plan,
                                               at::ScalarType work, double tol, uint64_t seed,
                                               const std::vector<uint64_t>& keys) {
  const c10::cuda::CUDAGuard guard(weights.front().device());
  TorchMemory memory;
  return gram_launch(weights, plan, dense_options(work, tol, seed), keys,
                     cuda::context(c10::cuda::getCurrentCUDAStream(), memory));
}

Factors svd_driver_cuda(const at::Tensor& weight, core::SvdMethod method, int64_t rank) {
  const c10::cuda::CUDAGuard guard(weight.device());
  TorchMemory memory;
  return svd_driver_launch(weight, method, rank, cuda::context(c10::cuda::getCurrentCUDAStream(), memory));
}

std::vector<double> norms_cuda(const std::vector<at::Tensor>& weights) {
  const c10::cuda::CUDAGuard guard(weights.front().device());
  return frobenius_norms(weights);
}

int64_t free_memory_cuda() {
  size_t free = 0, total = 0;
  C10_CUDA_CHECK(cudaMemGetInfo(&free, &total));
  if (!c10::cuda::CUDACachingAllocator::get()->initialized())
    return int64_t(free);  // all weights are another library's
  const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(c10::cuda::current_device());
  constexpr size_t kAll = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
  return int64_t(free) + stats.reserved_bytes[kAll].current - stats.allocated_bytes[kAll].current;
}

}  // namespace osora
