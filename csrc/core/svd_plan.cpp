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

// Costs in multiply-adds at the speed of a large matrix product, fitted to one CPU core with MKL (docs/svd.md, "Which
// method"): Lanczos multiplies some 15 r columns and spends 0.6 times that on keeping its basis; eigenvectors of an
// n x n matrix run at an eighth of the speed of a product of their size.
double lanczos_cost(const SvdPlan& plan) {
  return 24.0 * double(plan.rank) * double(plan.rows) * double(plan.cols) + 3.5e8;
}
double gram_cost(const SvdPlan& plan) {
  const double n = double(plan.cols);
  return (0.75 * double(plan.rows) + 4.0 * n) * n * n;
}

}  // namespace

SvdPlan plan_svd(int64_t d, int64_t k, int64_t rank, int64_t itemsize, const std::string& method) {
  SvdPlan plan{};
  plan.transposed = d < k;
  plan.rows = std::max(d, k);
  plan.cols = std::min(d, k);
  plan.rank = rank;
  set_widths(plan);
  if (method == "auto") {
    const bool room = plan.basis * 2 <= plan.cols;
    plan.method = room && lanczos_cost(plan) < gram_cost(plan) ? SvdMethod::kLanczos : SvdMethod::kGram;
  } else if (method == "lanczos") {
    if (plan.basis > plan.cols) {
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
    case SvdMethod::kGram:  // the scaled copy, G, its eigenvectors and LAPACK's workspace, and the triplets
      plan.bytes = itemsize * (weight + 4 * plan.cols * plan.cols + 3 * (plan.rows + plan.cols) * rank);
      break;
    case SvdMethod::kFull:  // the scaled copy and LAPACK's, full factors, and its workspace
      plan.bytes = itemsize * (3 * weight + 5 * plan.cols * plan.cols);
      break;
  }
  return plan;
}

}  // namespace osora::core
