// SPDX-License-Identifier: Apache-2.0
// torch.ops.osora_emulated.svd_driver: cuSOLVER's drivers on CPU tensors, by the stand-ins. Compiled with the real CUDA
// headers, so apart from operators.cpp.
#include <torch/library.h>

#include "standins/memory.h"
#include "standins/standins.h"
#include "torch/svd/svd_drivers_launch.h"

namespace osora {
namespace {

struct StandinMemory : cuda::Allocator {
  std::shared_ptr<void> allocate(size_t bytes) override { return standins::allocate(bytes); }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> svd_driver(const at::Tensor& weight, int64_t method, int64_t rank) {
  StandinMemory memory;
  auto found = svd_driver_launch(weight, core::SvdMethod{method}, rank, cuda::context(standins::stream(), memory));
  return {found.U, found.S, found.V};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(osora_emulated, m) {
  m.def("svd_driver(Tensor weight, int method, int rank) -> (Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(osora_emulated, CPU, m) { m.impl("svd_driver", &svd_driver); }

}  // namespace osora
