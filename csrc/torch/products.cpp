// SPDX-License-Identifier: Apache-2.0
#include "torch/products.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>

#include "cpu/features.h"
#include "cpu/outer.h"
#include "torch/checks.h"
#include "torch/guards.h"
#include "torch/workers.h"

namespace osora {
namespace {

#ifdef OSORA_X86_64
// P[d, r] = dy^T h in bfloat16 with float32 sums, on AMX tiles. Each entry is one thread's: same bits on any number.
at::Tensor outer_sum_amx(const at::Tensor& dy, const at::Tensor& h) {
  const int64_t n = dy.size(0), d = dy.size(1), r = h.size(1);
  auto P = at::empty({d, r}, dy.options().dtype(at::kFloat));
  auto packed = at::empty({cpu::outer_packed_size(n, r)}, h.options());
  const auto bits = [](const at::Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); };
  cpu::outer_pack(bits(h), n, r, h.stride(0), static_cast<uint16_t*>(packed.mutable_data_ptr()));
  const int64_t blocks = (d + cpu::kOuterColumns - 1) / cpu::kOuterColumns;
  at::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
    const OperatorGuard guard(dy.device());  // a thread of the pool starts without ours
    auto scratch = at::empty({cpu::outer_scratch_size()}, h.options());
    cpu::outer_amx(bits(dy), n, dy.stride(0), bits(packed), r, begin * cpu::kOuterColumns,
                   std::min(d, end * cpu::kOuterColumns), static_cast<uint16_t*>(scratch.mutable_data_ptr()),
                   P.mutable_data_ptr<float>());
  });
  return P;
}
#endif

// a b in b's dtype, a few rows of a at a time, each by one thread: BLAS would divide sums among its threads, and give
// other bits on another number of them. An `a` of 16 bits is widened a part at a time: no copy of it ever exists.
at::Tensor product_by_rows(const at::Tensor& a, const at::Tensor& b) {
  constexpr int64_t kRows = 64, kInner = 512;
  const int64_t m = a.size(0), inner = a.size(1);
  auto out = at::empty({m, b.size(1)}, b.options());
  at::parallel_for(0, (m + kRows - 1) / kRows, 1, [&](int64_t first, int64_t last) {
    const OperatorGuard guard(a.device());  // a thread of the pool starts without ours
    const SingleThreadedBlas alone;
    for (int64_t begin = first * kRows; begin < std::min(m, last * kRows); begin += kRows) {
      const int64_t count = std::min(kRows, m - begin);
      const auto rows = a.narrow(0, begin, count);
      auto part = out.narrow(0, begin, count);
      if (a.scalar_type() == b.scalar_type()) {
        at::mm_out(part, rows, b);
        continue;
      }
      part.zero_();
      for (int64_t column = 0; column < inner; column += kInner) {
        const int64_t width = std::min(kInner, inner - column);
        part.addmm_(rows.narrow(1, column, width).to(b.scalar_type()), b.narrow(0, column, width));
      }
    }
  });
  return out;
}

}  // namespace

at::Tensor down_product(const at::Tensor& x, const at::Tensor& V) {
  const bool blas = x.is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble);
  return blas ? product_by_rows(x, V) : at::mm(x, V);
}

at::Tensor outer_sum(const at::Tensor& dy, const at::Tensor& h) {
  const auto exact = accumulate_type(dy.scalar_type());
  if (dy.is_cuda()) return exact == dy.scalar_type() ? at::mm(dy.t(), h) : at::mm(dy.t(), h, exact);
#ifdef OSORA_X86_64
  if (dy.scalar_type() == at::kBFloat16 && cpu::features().amx && dy.stride(1) == 1 && h.stride(1) == 1) {
    return outer_sum_amx(dy, h);
  }
#endif
  return product_by_rows(dy.t(), h.to(exact));
}

}  // namespace osora
