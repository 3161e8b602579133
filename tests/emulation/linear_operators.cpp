// SPDX-License-Identifier: Apache-2.0
// The kernels around the linear operator, by the emulator on CPU tensors: steps that no operator of torch.ops.osora is
// alone. Through the same glue as on a card.
#include <torch/library.h>

#include "torch/multi_launch.h"

namespace osora {
namespace {

at::Tensor multi_scale_emulated(const at::Tensor& h, const at::Tensor& S0, const at::Tensor& s,
                                const std::optional<at::Tensor>& ranks, const at::Tensor& index) {
  TORCH_CHECK(S0.size(0) == h.size(1) && s.size(1) == h.size(1) && index.size(0) == h.size(0) &&
              (!ranks || ranks->size(0) == s.size(0)));
  return multi_scale_launch(h, S0, s, ranks, index, /*stream=*/nullptr);
}

void multi_combine_emulated(const at::Tensor& y, const at::Tensor& t, const at::Tensor& o, const at::Tensor& index) {
  TORCH_CHECK(t.size(0) == 2 * y.size(0) && t.size(1) == y.size(1) && o.size(1) == y.size(1) &&
              index.size(0) == y.size(0));
  multi_combine_launch(y, t, o, index, /*stream=*/nullptr);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(osora_emulated, m) {
  m.def("multi_scale(Tensor h, Tensor S0, Tensor s, Tensor? ranks, Tensor index) -> Tensor");
  m.def("multi_combine(Tensor(a!) y, Tensor t, Tensor o, Tensor index) -> ()");
}
TORCH_LIBRARY_IMPL(osora_emulated, CPU, m) {
  m.impl("multi_scale", &multi_scale_emulated);
  m.impl("multi_combine", &multi_combine_emulated);
}

}  // namespace osora
