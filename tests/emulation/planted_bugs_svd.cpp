// SPDX-License-Identifier: Apache-2.0
// The barriers of csrc/cuda/svd/svd_orthogonal.cu and svd_ritz.cu, each left out in its turn: see planted_bugs.cpp.
#include <cmath>
#include <vector>

#include "cuda/common/launch.h"
#include "cuda/svd/svd_steps.cuh"

namespace {
int dropped_barrier = -1;
constexpr int kFirstBarrier = __COUNTER__ + 1;
void numbered_barrier(int number, osora::emulation::Site site = osora::emulation::Site::current()) {
  if (number - kFirstBarrier != dropped_barrier) osora::emulation::block_barrier(site);
}
}  // namespace
#define __syncthreads() numbered_barrier(__COUNTER__)
// clang-format off: svd_orthogonal.cu has the first numbers
#include "cuda/svd/svd_orthogonal.cu"  // NOLINT
#include "cuda/svd/svd_ritz.cu"  // NOLINT
// clang-format on
#undef __syncthreads
constexpr int kBarriers = __COUNTER__ - kFirstBarrier;

namespace {

using namespace osora::cuda;

template <class T>
Matrices matrix(std::vector<T>& numbers, int64_t rows, int64_t cols) {
  return {numbers.data(), sizeof(T) == 8 ? Type::kFloat64 : Type::kFloat32, rows, cols, 1, rows * cols};
}

// Column j is e_j + e_(j+1): its Gram matrix has 2 on the diagonal and 1 beside it, and so its factor is known.
bool solves() {
  const int64_t rows = 150, cols = 35;
  std::vector<double> z(rows * cols), parts(row_strips(rows) * cols * cols);
  for (int64_t j = 0; j < cols; ++j) z[j * rows + j * 3] = z[j * rows + j * 3 + 3] = 1;
  const std::vector<uint64_t> keys(1);
  gram_parts(matrix(z, rows, cols), nullptr, parts.data(), nullptr);
  solve_strips(matrix(z, rows, cols), parts.data(), {{}, {keys.data(), 0}, 1e-15, 1e-6, nullptr, nullptr}, nullptr);
  bool right = true;
  for (int64_t i = 0; i < cols; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      double sum = 0;
      for (int64_t row = 0; row < rows; ++row) sum += z[i * rows + row] * z[j * rows + row];
      right = right && std::fabs(sum - (i == j)) < 1e-12;
    }
  }
  return right;
}

bool projects() {
  const int64_t rows = 100, width = 40, cols = 20;
  std::vector<float> v(rows * width), z(rows * cols, 1.0f);
  std::vector<double> parts(row_strips(rows) * width * cols);
  for (int64_t w = 0; w < width; ++w) v[w * rows + w] = 1;
  inner_parts(matrix(v, rows, width), matrix(z, rows, cols), nullptr, parts.data(), nullptr);
  subtract_inside(matrix(v, rows, width), parts.data(), nullptr, matrix(z, rows, cols), nullptr);
  bool right = true;
  for (int64_t i = 0; i < rows * cols; ++i) right = right && z[i] == (i % rows < width ? 0.0f : 1.0f);
  return right;
}

bool picks() {
  const int64_t n = 300, block = 3;
  std::vector<double> q(n * n), tails(n);
  std::vector<int> which(block, -1);
  for (int64_t j = 0; j < n; ++j) q[j * n + n - 1] = static_cast<double>((j * 7) % n);  // 7 and 300 have no divisor
  longest_tails(matrix(q, n, n), block, n, tails.data(), which.data(), nullptr);
  bool right = true;
  for (int64_t i = 0; i < block; ++i) right = right && which[i] >= 0 && (which[i] * 7) % n == n - 1 - i;
  return right;
}

}  // namespace

int svd_barriers() { return kBarriers; }

// Whether right numbers came out without the barrier of that number.
bool right_without_svd_barrier(int number) {
  dropped_barrier = number;
  bool right = solves();
  right = projects() && right;
  return picks() && right;
}
