// SPDX-License-Identifier: Apache-2.0
#include "torch/linear/multi.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "core/accumulate.h"
#include "cpu/multi.h"
#include "torch/common/checks.h"
#include "torch/common/numbers.h"
#ifdef OSORA_CUDA
#include "torch/linear/on_cuda.h"
#endif

namespace osora {
namespace {

constexpr int64_t kGrain = 16384;  // numbers for which another thread is worth waking

at::Tensor ready(const at::Tensor& t, at::ScalarType type) { return t.to(type).contiguous(); }

at::Tensor multi_scale_cpu(const at::Tensor& h, const at::Tensor& S0, const at::Tensor& s,
                           const std::optional<at::Tensor>& ranks, const at::Tensor& index) {
  const int64_t n = h.size(0), r = h.size(1);
  auto t = at::empty({2 * n, r}, h.options());
  with_number(h.scalar_type(), [&](auto number) {
    using T = decltype(number);
    using A = core::accumulate_t<T>;
    at::parallel_for(0, n, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, r)), [&](int64_t begin, int64_t end) {
      cpu::multi_scale_rows(h.const_data_ptr<T>(), S0.const_data_ptr<A>(), s.const_data_ptr<A>(),
                            ranks ? ranks->const_data_ptr<int64_t>() : nullptr, index.const_data_ptr<int64_t>(),
                            t.mutable_data_ptr<T>(), begin, end, n, r);
    });
  });
  return t;
}

void multi_combine_cpu(at::Tensor& y, const at::Tensor& t, const at::Tensor& o, const at::Tensor& index) {
  const int64_t n = y.size(0), d = y.size(1);
  with_number(y.scalar_type(), [&](auto number) {
    using T = decltype(number);
    using A = core::accumulate_t<T>;
    at::parallel_for(0, n * d, kGrain, [&](int64_t begin, int64_t end) {
      cpu::multi_combine(y.mutable_data_ptr<T>(), t.const_data_ptr<T>(), o.const_data_ptr<A>(),
                         index.const_data_ptr<int64_t>(), begin, end, n, d);
    });
  });
}

}  // namespace

at::Tensor multi_scale(const at::Tensor& h, const at::Tensor& S0, const at::Tensor& s,
                       const std::optional<at::Tensor>& ranks, const at::Tensor& index) {
  const auto exact = accumulate_type(h.scalar_type());
  const auto s0 = ready(S0, exact), ds = ready(s, exact);
  const auto r = ranks ? std::make_optional(ranks->to(h.device()).contiguous()) : std::nullopt;
#ifdef OSORA_CUDA
  if (h.is_cuda()) return multi_scale_cuda(h, s0, ds, r, index);
#endif
  return multi_scale_cpu(h, s0, ds, r, index);
}

void multi_combine(at::Tensor& y, const at::Tensor& t, const at::Tensor& o, const at::Tensor& index) {
  const auto d_o = ready(o, accumulate_type(y.scalar_type()));
#ifdef OSORA_CUDA
  if (y.is_cuda()) return multi_combine_cuda(y, t, d_o, index);
#endif
  multi_combine_cpu(y, t, d_o, index);
}

}  // namespace osora
