// SPDX-License-Identifier: Apache-2.0
#include "core/svd_drivers_limits.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace osora::core {
namespace {

constexpr int64_t kInt = std::numeric_limits<int32_t>::max();
// gesvdj asks for two to three numbers an entry: 802864160 for 20000 x 20000 (github.com/JuliaGPU/CUDA.jl/issues/1880,
// in bytes there). Four, because a size that wraps to a small positive one would not be noticed.
constexpr int64_t kJacobiEntries = kInt / 4;

std::string quoted(SvdMethod method) { return "method \"" + svd_method_names()[size_t(method)] + "\""; }

void refuse_entries(SvdMethod method, int64_t d, int64_t k, int64_t most, const char* reason) {
  if (k <= most / d) return;
  throw std::invalid_argument(quoted(method) + " needs out_features * in_features <= " + std::to_string(most) + ": " +
                              reason + "; got " + std::to_string(d) + " * " + std::to_string(k));
}

}  // namespace

int64_t gesvdr_oversampling(int64_t cols, int64_t rank) {
  return std::min(std::max<int64_t>(2 * rank, 8), cols - 1 - rank);
}

void refuse_driver(SvdMethod method, int64_t d, int64_t k, int64_t rank, int64_t /*itemsize*/) {
  const int64_t cols = std::min(d, k);
  if (method == SvdMethod::kGesvdr && gesvdr_oversampling(cols, rank) < 1) {
    throw std::invalid_argument(quoted(method) + " needs rank <= min(out_features, in_features) - 2 = " +
                                std::to_string(cols - 2) + ", got " + std::to_string(rank));
  }
  if (method == SvdMethod::kGesvdj) refuse_entries(method, d, k, kJacobiEntries, "an int counts its workspace");
  if (method == SvdMethod::kGesvda) refuse_entries(method, d, k, kInt, "an int counts its entries");
}

void refuse_workspace(SvdMethod method, int64_t numbers) {
  if (numbers >= 0) return;
  throw std::invalid_argument(quoted(method) + " asks for a workspace of " + std::to_string(numbers) +
                              " numbers: the count has overflown its int; use a smaller matrix");
}

}  // namespace osora::core
