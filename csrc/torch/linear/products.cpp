// SPDX-License-Identifier: Apache-2.0
#include "torch/linear/products.h"

#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>

#include "cpu/features.h"
#include "cpu/outer.h"
#include "cpu/skinny.h"
#include "torch/common/checks.h"
#include "torch/common/guards.h"
#include "torch/common/workers.h"

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
  if (m <= kRows && a.scalar_type() == b.scalar_type()) {
    const SingleThreadedBlas alone;
    return at::mm(a, b);
  }
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

bool is_float_on_cpu(const at::Tensor& t) { return t.is_cpu() && t.scalar_type() == at::kFloat; }

// P[d, r] = dy^T h in float32: columns of dy a few at a time, each by one thread, in blocks of rows that stay in the
// cache for all columns of h.
at::Tensor outer_sum_skinny(const at::Tensor& dy, const at::Tensor& h) {
  constexpr int64_t kColumns = 96, kRows = 256, kMultiple = 8;
  const int64_t n = dy.size(0), d = dy.size(1), r = h.size(1), wide = (r + kMultiple - 1) / kMultiple * kMultiple;
  const auto right = wide == r ? h.contiguous() : at::constant_pad_nd(h, {0, wide - r});
  auto P = at::empty({d, r}, dy.options());
  const float* const left = dy.const_data_ptr<float>();
  at::parallel_for(0, (d + kColumns - 1) / kColumns, 1, [&](int64_t first, int64_t last) {
    const OperatorGuard guard(dy.device());  // a thread of the pool starts without ours
    auto sums = at::empty({wide, kColumns}, dy.options());
    float* const sum = sums.mutable_data_ptr<float>();
    for (int64_t begin = first * kColumns; begin < std::min(d, last * kColumns); begin += kColumns) {
      const int64_t count = std::min(kColumns, d - begin);
      for (int64_t row = 0; row == 0 || row < n; row += kRows) {
        cpu::skinny()->back(left + row * dy.stride(0) + begin, std::min(kRows, n - row), count, dy.stride(0),
                            right.const_data_ptr<float>() + row * wide, wide, 1.0f, row > 0, sum);
      }
      float* const out = P.mutable_data_ptr<float>() + begin * r;
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t j = 0; j < r; ++j) out[i * r + j] = sum[j * count + i];
      }
    }
  });
  return P;
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
  if (is_float_on_cpu(dy) && cpu::skinny() && dy.stride(1) == 1) return outer_sum_skinny(dy, h);
  return product_by_rows(dy.t(), h.to(exact));
}

std::optional<at::Tensor> summed_weight(const at::Tensor& W, const at::Tensor& D, const at::Tensor& V) {
  if (!is_float_on_cpu(W) || !cpu::skinny()) return std::nullopt;
  if (W.stride(1) != 1 && W.stride(0) == 1) {  // GPT-2's: W^T + V D^T
    auto transposed = summed_weight(W.t(), V, D);
    return transposed ? std::optional(transposed->t()) : std::nullopt;
  }
  if (W.stride(1) != 1) return std::nullopt;
  const auto rows = [](const at::Tensor& t) { return t.stride(1) == 1 ? t : t.contiguous(); };
  const auto left = rows(D), right = rows(V);
  const int64_t d = W.size(0), k = W.size(1), r = V.size(1), strips = cpu::strips(k);
  auto packed = at::empty({strips, r, cpu::kStrip}, W.options());
  auto sum = at::empty({d, k}, W.options());
  const auto grain = [](int64_t work) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, work)); };
  at::parallel_for(0, strips, grain(cpu::kStrip * r), [&](int64_t begin, int64_t end) {
    cpu::pack_strips(right.const_data_ptr<float>(), k, r, right.stride(0), begin, end,
                     packed.mutable_data_ptr<float>());
  });
  constexpr int64_t kRows = 24;  // a multiple of the kernels' rows, so that threads share no tile
  at::parallel_for(0, (d + kRows - 1) / kRows, grain(kRows * k), [&](int64_t begin, int64_t end) {
    const int64_t row = begin * kRows;
    cpu::skinny()->plus(left.const_data_ptr<float>() + row * left.stride(0), std::min(d, end * kRows) - row, r,
                        left.stride(0), packed.const_data_ptr<float>(), k,
                        W.const_data_ptr<float>() + row * W.stride(0), W.stride(0),
                        sum.mutable_data_ptr<float>() + row * k, k);
  });
  return sum;
}

}  // namespace osora
