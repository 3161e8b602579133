// SPDX-License-Identifier: Apache-2.0
// x [..., c] as the matrix [n, c] that a product takes, and the shape of what comes out.
#pragma once
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace osora {

// t[..., c] as [n, c] in a layout GEMM takes as it is (one unit stride, no overlap); copies only if it must.
inline at::Tensor as_rows(const at::Tensor& t) {
  const int64_t c = t.size(-1);
  int64_t n = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) n *= t.size(i);
  auto rows = t.reshape({n, c});
  const bool row_major = rows.stride(1) == 1 && rows.stride(0) >= std::max<int64_t>(1, c);
  const bool column_major = rows.stride(0) == 1 && rows.stride(1) >= std::max<int64_t>(1, n);
  return row_major || column_major ? rows : rows.contiguous();
}

inline std::vector<int64_t> with_last(const at::Tensor& t, int64_t last) {
  auto sizes = t.sizes().vec();
  sizes.back() = last;
  return sizes;
}

}  // namespace osora
