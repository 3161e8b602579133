// SPDX-License-Identifier: Apache-2.0
// torch.ops.osora_emulated.truncated_svd: the operator itself, from its arguments down, as it runs beside a card; for
// csrc/torch/svd/on_cuda.cpp, which needs torch's allocator on a card, stands this file.
#include <torch/library.h>

#include <list>

#include "standins/memory.h"
#include "standins/standins.h"
#include "torch/svd/decompose.h"
#include "torch/svd/on_cuda.h"
#include "torch/svd/svd_drivers_launch.h"
#include "torch/svd/svd_launch.h"

namespace osora {
namespace {

class StandinMemory : public cuda::Allocator {
 public:
  std::shared_ptr<void> allocate(size_t bytes) override { return standins::allocate(bytes); }
};

int64_t free_bytes = int64_t{1} << 32;
std::vector<std::string> asked;  // which batches were handed down, in words

// The weights' own memory is the device's for as long as this lives.
struct OnDevice {
  explicit OnDevice(const std::vector<at::Tensor>& weights) {
    for (const auto& weight : weights) {
      contiguous.push_back(weight.contiguous());
      lent.emplace_back(contiguous.back().const_data_ptr(), contiguous.back().nbytes());
    }
  }
  std::vector<at::Tensor> contiguous;
  std::list<standins::Lent> lent;
};

cuda::DenseOptions dense_options(at::ScalarType work, double tol, uint64_t seed) {
  cuda::DenseOptions options;
  options.float64_work = work == at::kDouble;
  options.tol = tol;
  options.seed = seed;
  return options;
}

cuda::Context& context() {
  static StandinMemory memory;
  return cuda::context(standins::stream(), memory);
}

std::string name(at::ScalarType type) { return type == at::kDouble ? "float64" : c10::toString(type); }

}  // namespace

std::vector<core::Found<at::Tensor>> lanczos_cuda(const std::vector<at::Tensor>& weights, const core::SvdPlan& plan,
                                                  at::ScalarType work, double tol, uint64_t seed,
                                                  const std::vector<uint64_t>& keys, int64_t max_passes) {
  asked.push_back("lanczos of " + std::to_string(weights.size()) + " in " + name(work));
  const OnDevice device(weights);
  return lanczos_launch(device.contiguous, plan, dense_options(work, tol, seed), keys, max_passes, context());
}

std::vector<core::Found<at::Tensor>> gram_cuda(const std::vector<at::Tensor>& weights, const core::SvdPlan& plan,
                                               at::ScalarType work, double tol, uint64_t seed,
                                               const std::vector<uint64_t>& keys) {
  asked.push_back("gram of " + std::to_string(weights.size()) + " in " + name(work));
  const OnDevice device(weights);
  return gram_launch(device.contiguous, plan, dense_options(work, tol, seed), keys, context());
}

Factors svd_driver_cuda(const at::Tensor& weight, core::SvdMethod method, int64_t rank) {
  asked.push_back(core::svd_method_names()[static_cast<size_t>(method)] + " in " + name(weight.scalar_type()));
  return svd_driver_launch(weight, method, rank, context());
}

std::vector<double> norms_cuda(const std::vector<at::Tensor>& weights) { return frobenius_norms(weights); }

int64_t free_memory_cuda() { return free_bytes; }

TORCH_LIBRARY_FRAGMENT(osora_emulated, m) {
  m.def(
      "truncated_svd(Tensor[] weights, int rank, float tol, int seed, int[] keys, str method, int max_memory=0)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("set_free_memory(int bytes) -> ()", [](int64_t bytes) { free_bytes = bytes; });
  // What was asked of csrc/cuda since the last call of this.
  m.def("asked() -> str[]", [] { return std::exchange(asked, {}); });
}
TORCH_LIBRARY_IMPL(osora_emulated, CPU, m) { m.impl("truncated_svd", &truncated_svd); }

}  // namespace osora
