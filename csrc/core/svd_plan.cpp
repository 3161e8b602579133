// SPDX-License-Identifier: Apache-2.0
#include "core/svd_plan.h"

#include <algorithm>
#include <stdexcept>

namespace osora::core {
namespace {

// Block, kept and largest width of the basis (docs/svd.md, "Widths"): a quarter of the rank at a time, kept 1.25 r, and
// at least three new blocks before a restart, since fewer waste what a Krylov space gains.
void set_widths(SvdPlan& plan) {
  const int64_t r = plan.rank;
  plan.block = std::clamp<int64_t>(r / 32 * 8, 16, 128);
  plan.keep = r + std::max(plan.block, r / 4);
  plan.basis = std::max(plan.keep + 3 * plan.block, 2 * r + plan.block);
}

}  // namespace

SvdPlan plan_svd(int64_t d, int64_t k, int64_t rank, int64_t itemsize, const std::string& method) {
  SvdPlan plan{};
  plan.transposed = d < k;
  plan.rows = std::max(d, k);
  plan.cols = std::min(d, k);
  plan.rank = rank;
  set_widths(plan);
  const bool lanczos_fits = plan.basis <= plan.cols;
  if (method == "auto") {
    // A basis of more than half the columns costs more than the eigenvectors of the small Gram matrix, which are
    // computed in float64 and so lose nothing for 32-bit and shorter weights. A float64 weight needs the real thing.
    if (plan.basis * 2 <= plan.cols) {
      plan.method = SvdMethod::kLanczos;
    } else {
      plan.method = itemsize == 8 ? SvdMethod::kFull : SvdMethod::kGram;
    }
  } else if (method == "lanczos") {
    if (!lanczos_fits) {
      throw std::invalid_argument(
          "method \"lanczos\" needs min(out_features, in_features) >= " + std::to_string(plan.basis) + " at rank " +
          std::to_string(rank) + ", got " + std::to_string(plan.cols) + "; use method=\"auto\"");
    }
    plan.method = SvdMethod::kLanczos;
  } else if (method == "gram") {
    plan.method = SvdMethod::kGram;
  } else if (method == "full") {
    plan.method = SvdMethod::kFull;
  } else {
    throw std::invalid_argument("method must be \"auto\", \"lanczos\", \"gram\" or \"full\", got \"" + method + "\"");
  }
  const int64_t weight = plan.rows * plan.cols;
  switch (plan.method) {
    case SvdMethod::kLanczos:  // the scaled copy, V and Y, their rotated successors, and the float64 Y of one Gram
      plan.bytes =
          itemsize * (weight + (plan.rows + plan.cols) * (plan.basis + plan.keep)) + 8 * plan.rows * plan.basis;
      break;
    case SvdMethod::kGram:  // the scaled copy, its float64 twin, G and its eigenvectors
      plan.bytes = itemsize * weight + 8 * (weight + 3 * plan.cols * plan.cols);
      break;
    case SvdMethod::kFull:  // the scaled copy, its float64 twin, full factors and LAPACK's workspace
      plan.bytes = itemsize * weight + 8 * (3 * weight + 5 * plan.cols * plan.cols);
      break;
  }
  return plan;
}

const char* method_name(SvdMethod method) {
  switch (method) {
    case SvdMethod::kLanczos:
      return "lanczos";
    case SvdMethod::kGram:
      return "gram";
    case SvdMethod::kFull:
      return "full";
  }
  return "unknown";
}

}  // namespace osora::core
