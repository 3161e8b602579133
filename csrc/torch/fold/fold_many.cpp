// SPDX-License-Identifier: Apache-2.0
#include "torch/fold/fold_many.h"

#include <ATen/Parallel.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "torch/common/checks.h"
#include "torch/common/guards.h"
#include "torch/fold/fold.h"

namespace osora {
namespace {

// Numbers of D that one task computes, so that the cores share layers of different sizes evenly.
constexpr int64_t kNumbersPerTask = 16384;

struct Task {
  size_t layer;
  int64_t begin, end;  // rows
};

std::vector<at::Tensor> fold_many_cpu(const FoldInputs& layers) {
  std::vector<at::Tensor> D, start;
  std::vector<Task> tasks;
  for (size_t k = 0; k < layers.U.size(); ++k) {
    const auto& U = layers.U[k];
    D.push_back(at::empty_like(U));
    start.push_back(at::add(layers.S0[k], layers.s[k]));
    const int64_t rows = std::max<int64_t>(1, kNumbersPerTask / std::max<int64_t>(1, U.size(1)));
    for (int64_t i = 0; i < U.size(0); i += rows) tasks.push_back({k, i, std::min(i + rows, U.size(0))});
  }
  at::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const auto& [k, begin, end] = tasks[t];
      fold_rows_cpu(layers.U[k], start[k], layers.s[k], layers.o[k], D[k], begin, end);
    }
  });
  return D;
}

std::vector<at::Tensor> fold_many(at::TensorList U, at::TensorList S0, at::TensorList s, at::TensorList o) {
  check_fold_many(U, S0, s, o);
  if (U.empty()) return {};
  const OperatorGuard guard(U.front().device());
  const auto layers = fold_inputs(U, S0, s, o);
#ifdef OSORA_CUDA
  if (U.front().is_cuda()) return fold_many_cuda(layers);
#endif
  return fold_many_cpu(layers);
}

}  // namespace

TORCH_LIBRARY_IMPL(osora, CPU, m) { m.impl("fold_many", &fold_many); }

#ifdef OSORA_CUDA
TORCH_LIBRARY_IMPL(osora, CUDA, m) { m.impl("fold_many", &fold_many); }
#endif

}  // namespace osora
