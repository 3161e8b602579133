// SPDX-License-Identifier: Apache-2.0
#include "cpu/skinny.h"
#include "cpu/skinny_tiles.h"

namespace osora::cpu {
namespace {

void times(const float* a, int64_t m, int64_t k, int64_t lda, const float* x, int64_t n, float alpha, float* y) {
  int64_t j = 0;
  for (; j + 16 <= n; j += 16) times_strip<Eight, 6, 2>(a, m, k, lda, x + j, n, alpha, y + j);
  if (j < n) times_strip<Eight, 8, 1>(a, m, k, lda, x + j, n, alpha, y + j);
}

}  // namespace

extern const Skinny skinny_avx2{times, back_all<Eight, 4, 3>, plus_all<Eight, 6, 2>, scan<Eight>};

}  // namespace osora::cpu
