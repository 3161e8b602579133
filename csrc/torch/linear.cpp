// SPDX-License-Identifier: Apache-2.0
// The linear operator and its gradient. The big products are ATen's (MKL, oneDNN, cuBLAS), the fold and its
// reduction ours; one source serves CPU and CUDA.
//
// The small product comes first and the big one accumulates into it in place (beta = 1): that hides one pass over y,
// and rounds the big term once (docs/method.md, "Order of the products").
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>

#include "cpu/features.h"
#include "cpu/outer.h"
#include "torch/checks.h"
#include "torch/fold.h"
#include "torch/guards.h"
#include "torch/workers.h"

namespace osora {
namespace {

using Optional = std::optional<at::Tensor>;

// t[..., c] as [n, c] in a layout GEMM takes as it is (one unit stride, no overlap); copies only if it must.
at::Tensor as_rows(const at::Tensor& t) {
  const int64_t c = t.size(-1);
  int64_t n = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) n *= t.size(i);
  auto rows = t.reshape({n, c});
  const bool row_major = rows.stride(1) == 1 && rows.stride(0) >= std::max<int64_t>(1, c);
  const bool column_major = rows.stride(0) == 1 && rows.stride(1) >= std::max<int64_t>(1, n);
  return row_major || column_major ? rows : rows.contiguous();
}

std::vector<int64_t> with_last(const at::Tensor& t, int64_t last) {
  auto sizes = t.sizes().vec();
  sizes.back() = last;
  return sizes;
}

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
      for (int64_t at = 0; at < inner; at += kInner) {
        const int64_t width = std::min(kInner, inner - at);
        part.addmm_(rows.narrow(1, at, width).to(b.scalar_type()), b.narrow(0, at, width));
      }
    }
  });
  return out;
}

// h[n, r] = x V, the tensor that is saved: same bits on any number of threads.
at::Tensor down(const at::Tensor& x, const at::Tensor& V) {
  const bool blas = x.is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble);
  return blas ? product_by_rows(x, V) : at::mm(x, V);
}

// P[d, r] = dy^T h, summed over all rows in the accumulation dtype.
at::Tensor outer_sum(const at::Tensor& dy, const at::Tensor& h) {
  const auto exact = accumulate_type(dy.scalar_type());
  if (dy.is_cuda()) return exact == dy.scalar_type() ? at::mm(dy.t(), h) : at::mm(dy.t(), h, exact);
#ifdef OSORA_X86_64
  if (dy.scalar_type() == at::kBFloat16 && cpu::features().amx && dy.stride(1) == 1 && h.is_contiguous()) {
    return outer_sum_amx(dy, h);
  }
#endif
  return product_by_rows(dy.t(), h.to(exact));
}

std::tuple<at::Tensor, at::Tensor> linear(const at::Tensor& x, const Optional& weight, const Optional& bias,
                                          const at::Tensor& U, const at::Tensor& V, const at::Tensor& S0,
                                          const at::Tensor& s, const at::Tensor& o) {
  check_linear(x, weight, bias, U, V, S0, s, o);
  const OperatorGuard guard(x.device());
  const auto rows = as_rows(x);
  auto h = down(rows, V);
  const auto D = fold(U, S0, s, o);
  if (weight && x.dim() > 2 && !x.is_contiguous()) {
    // torch's own linear multiplies such an x matrix by matrix and rounds before it adds the bias. So that an adapter
    // of zeros gives its very bits, it comes first here; such an x is rare, and copied anyway.
    auto y = at::linear(x, *weight, bias).contiguous();
    y.view({rows.size(0), U.size(0)}).addmm_(h, D.t());
    return {y, h};
  }
  auto y = bias ? at::addmm(*bias, h, D.t()) : at::mm(h, D.t());
  if (weight) y.addmm_(rows, weight->t());
  return {y.view(with_last(x, U.size(0))), h};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward(const at::Tensor& dy, const at::Tensor& h,
                                                               const Optional& weight, const at::Tensor& U,
                                                               const at::Tensor& V, const at::Tensor& S0,
                                                               const at::Tensor& s, const at::Tensor& o, bool need_x,
                                                               bool need_s, bool need_o) {
  check_linear_backward(dy, h, weight, U, V, S0, s, o);
  const OperatorGuard guard(dy.device());
  const auto rows = as_rows(dy);
  auto dx = at::empty({0}, dy.options());
  if (need_x) {
    dx = at::mm(at::mm(rows, fold(U, S0, s, o)), V.t());
    if (weight) dx.addmm_(rows, *weight);
    dx = dx.view(with_last(dy, V.size(0)));
  }
  const auto sums = dy.options().dtype(accumulate_type(dy.scalar_type()));
  auto ds = at::empty({0}, sums), d_o = at::empty({0}, sums);
  if (need_s || need_o) std::tie(ds, d_o) = fold_backward(U, outer_sum(rows, h), S0, s, o, need_s, need_o);
  return {dx, ds, d_o};
}

}  // namespace

TORCH_LIBRARY_IMPL(osora, CPU, m) {
  m.impl("linear", &linear);
  m.impl("linear_backward", &linear_backward);
}

#ifdef OSORA_CUDA
TORCH_LIBRARY_IMPL(osora, CUDA, m) {
  m.impl("linear", &linear);
  m.impl("linear_backward", &linear_backward);
}
#endif

}  // namespace osora
