// SPDX-License-Identifier: Apache-2.0
#include "core/svd_plan.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace osora::core {
namespace {

// Block, kept and largest width of the basis (docs/svd.md, "Widths"). Narrow blocks multiply fewer columns: a CPU takes
// an eighth of the rank, in the widths that cpu/skinny.h is fast at. A GPU's passes cost much the same up to a hundred
// columns, and each restart has an eigenproblem that is slow whatever its size: half of the rank, up to what
// cuda/svd/svd_orthogonal.cu takes, or a quarter. Fewer than three new blocks before a restart waste what a Krylov
// space gains.
void set_widths(SvdPlan& plan, bool cuda) {
  const int64_t r = plan.rank;
  const int64_t wide = std::max(std::min<int64_t>(r / 16 * 8, 64), std::min<int64_t>(r / 32 * 8, 128));
  plan.block = cuda ? std::max<int64_t>(wide, 16) : std::clamp<int64_t>(r / 64 * 8, 16, 48);
  plan.keep = r + std::max(plan.block, r / 2);
  plan.basis = plan.keep + std::max<int64_t>(3, (9 * r / 4 - plan.keep) / plan.block) * plan.block;
}

// Costs in multiply-adds at the speed of a large matrix product, fitted to one CPU core with MKL (docs/svd.md, "Which
// method"): Lanczos multiplies some 15 r columns and spends 0.6 times that on keeping its basis; eigenvectors of an
// n x n matrix run at an eighth of the speed of a product of their size.
double lanczos_cost(const SvdPlan& plan) {
  return 24.0 * double(plan.rank) * double(plan.rows) * double(plan.cols) + 3.5e8;
}
double gram_cost(const SvdPlan& plan) {
  const double n = double(std::min(plan.rows, plan.cols)), m = double(std::max(plan.rows, plan.cols));
  return (0.75 * m + 4.0 * n) * n * n;
}

SvdMethod choose(const SvdPlan& plan, const std::string& method) {
  if (method == "auto") {
    const bool room = plan.basis * 2 <= std::min(plan.rows, plan.cols);
    return room && lanczos_cost(plan) < gram_cost(plan) ? SvdMethod::kLanczos : SvdMethod::kGram;
  }
  const auto& names = svd_method_names();
  const auto found = std::find(names.begin(), names.end(), method);
  if (found == names.end()) {
    std::string allowed;
    for (const auto& name : names) allowed += ", \"" + name + "\"";
    throw std::invalid_argument("method must be \"auto\"" + allowed + ", got \"" + method + "\"");
  }
  return static_cast<SvdMethod>(found - names.begin());
}

void check_method(const SvdPlan& plan, const SvdMachine& machine) {
  if (plan.method == SvdMethod::kLanczos && plan.basis > std::min(plan.rows, plan.cols)) {
    throw std::invalid_argument("method \"lanczos\" needs min(out_features, in_features) >= " +
                                std::to_string(plan.basis) + " at rank " + std::to_string(plan.rank) + ", got " +
                                std::to_string(std::min(plan.rows, plan.cols)) + "; use method=\"auto\"");
  }
  if (plan.method >= SvdMethod::kGesvd && !machine.cuda) {
    throw std::invalid_argument("method \"" + svd_method_names()[size_t(plan.method)] +
                                "\" is a driver of cuSOLVER and needs a CUDA tensor and a build with CUDA; on the CPU, "
                                "\"full\" is LAPACK's gesdd");
  }
}

// The arrays of the first attempt that live at the same time, docs/svd.md, "Memory".
int64_t bytes_of(const SvdPlan& plan, int64_t itemsize, int64_t weight_itemsize, const SvdMachine& machine) {
  const int64_t rows = plan.rows, cols = plan.cols, weight = rows * cols, both = rows + cols;
  const int64_t copy = machine.cuda ? weight * (itemsize == 8 ? 8 : weight_itemsize) : 0;
  switch (plan.method) {
    case SvdMethod::kLanczos: {
      // V and Y, the rotated half of one, and a few blocks; the CPU's products have sums per group of panels besides.
      const int64_t width = std::max(plan.block, plan.rank);
      const int64_t groups = machine.threads == 1 ? 1 : 4 * machine.threads;
      const int64_t panels = machine.cuda ? 3 * rows * plan.block : groups * cols * width + machine.threads * (1 << 19);
      const int64_t exact = 8 * (machine.cuda ? rows : std::min<int64_t>(rows, 2048)) * plan.basis;
      // The third round of orthonormalise(): a product of the basis with the block for each strip of 256 rows.
      const int64_t strips = machine.cuda && plan.block <= 64 ? 8 * ((cols + 255) / 256) * plan.basis * plan.block : 0;
      return copy + exact + strips + 8 * 3 * plan.basis * plan.basis +
             itemsize * (both * plan.basis + std::max(rows, cols) * plan.keep + 6 * both * width + panels);
    }
    case SvdMethod::kGram: {  // G, its eigenvectors and LAPACK's workspace; the triplets of the last step
      const int64_t size = machine.cuda || gram_in_float64(plan) ? 8 : itemsize;
      return copy + size * (5 * cols * cols + 6 * both * plan.rank);
    }
    case SvdMethod::kLowrank:
      return copy + itemsize * 8 * both * plan.rank;
    default:  // a copy that the decomposition destroys, full factors and workspace of as much again
      return copy + itemsize * (4 * weight + 6 * cols * cols);
  }
}

}  // namespace

bool gram_in_float64(const SvdPlan& plan) { return 2 * plan.rank > std::min(plan.rows, plan.cols); }

const std::vector<std::string>& svd_method_names() {
  static const std::vector<std::string> names{"lanczos", "gram",   "full",   "lowrank", "gesvd",
                                              "gesvdj",  "gesvdp", "gesvda", "gesvdr"};
  return names;
}

SvdPlan plan_svd(int64_t d, int64_t k, int64_t rank, int64_t itemsize, int64_t weight_itemsize,
                 const std::string& method, const SvdMachine& machine) {
  SvdPlan plan{};
  plan.rows = d;
  plan.cols = k;
  plan.rank = rank;
  set_widths(plan, machine.cuda);
  plan.method = choose(plan, method);
  check_method(plan, machine);
  // The CPU's Lanczos reads W by rows, whichever side is longer: one pass serves A x and A^T A x. Everything else works
  // on the shorter side.
  plan.transposed = d < k && (machine.cuda || plan.method != SvdMethod::kLanczos);
  if (plan.transposed) std::swap(plan.rows, plan.cols);
  plan.bytes = bytes_of(plan, itemsize, weight_itemsize, machine);
  return plan;
}

}  // namespace osora::core
