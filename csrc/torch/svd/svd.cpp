// SPDX-License-Identifier: Apache-2.0
// The operators of the SVD: the decomposition, and what is known of it in advance.
#include <torch/library.h>

#include <stdexcept>

#include "core/svd_plan.h"
#include "core/svd_verdict.h"
#include "torch/svd/decompose.h"

namespace osora {
namespace {

// d, k and rank of a matrix, bytes of its dtype -> method, block, keep, basis, bytes: what truncated_svd would do.
std::vector<int64_t> svd_plan(int64_t d, int64_t k, int64_t rank, int64_t itemsize, std::string method, bool cuda,
                              int64_t threads) {
  TORCH_CHECK_VALUE(d > 0 && k > 0 && rank > 0 && rank <= std::min(d, k), "osora::svd_plan: rank must be in 1 .. min(",
                    d, ", ", k, "), got ", rank);
  try {
    const bool one_thread = !cuda && d * k <= kOneThreadEntries;
    const auto plan =
        core::plan_svd(d, k, rank, itemsize == 8 ? 8 : 4, itemsize, method, {cuda, one_thread ? 1 : threads});
    return {int64_t(plan.method), plan.block, plan.keep, plan.basis, plan.bytes};
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, "osora::svd_plan: ", error.what());
  }
}

double svd_floor(int64_t d, int64_t k, int64_t itemsize) {
  return core::rounding_floor(d, k, itemsize == 8 ? 0x1p-52 : 0x1p-23);
}

}  // namespace

TORCH_LIBRARY_IMPL(osora, CPU, m) { m.impl("truncated_svd", &truncated_svd); }
TORCH_LIBRARY_IMPL(osora, CUDA, m) { m.impl("truncated_svd", &truncated_svd); }
TORCH_LIBRARY_IMPL(osora, CompositeExplicitAutograd, m) {
  m.impl("svd_plan", &svd_plan);
  m.impl("svd_floor", &svd_floor);
}

}  // namespace osora
