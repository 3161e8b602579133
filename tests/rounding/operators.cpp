// SPDX-License-Identifier: Apache-2.0
#include <torch/library.h>

#include <atomic>

#include "errors.h"
#include "torch/svd/rounding.h"

namespace osora {
namespace {

std::atomic<int64_t> seed{0};

}  // namespace

void rounded(const at::Tensor& result, const at::Tensor& left, const at::Tensor& right, int exponent) {
  rounding::add_errors(static_cast<uint64_t>(seed.load()), result, left, right, exponent);
}

TORCH_LIBRARY_FRAGMENT(osora, m) {
  m.def("round_by(int seed) -> ()", [](int64_t next) { seed = next; });
}

}  // namespace osora
