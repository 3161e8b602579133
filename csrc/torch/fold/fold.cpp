// SPDX-License-Identifier: Apache-2.0
#include "torch/fold/fold.h"

#include <ATen/Parallel.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "core/accumulate.h"
#include "cpu/fold.h"
#include "cpu/fold_loops.h"
#include "torch/common/checks.h"
#include "torch/common/guards.h"
#include "torch/common/numbers.h"

namespace osora {
namespace {

// Rows per partial sum of ds: a constant, so that the result does not depend on the number of threads.
constexpr int64_t kRowsPerPartial = 256;

// loops(kernels, T()) for the numbers T that they are made for; false for others, and where there are none.
template <class Call>
bool take_vectors(at::ScalarType type, Call call) {
  const auto* const kernels = cpu::fold_kernels();
  if (!kernels || (type != at::kFloat && type != at::kBFloat16)) return false;
  if (type == at::kFloat) {
    call(kernels->float32, float());
  } else {
    call(kernels->bfloat16, uint16_t());
  }
  return true;
}

at::Tensor ready(const at::Tensor& t, at::ScalarType type) { return t.to(type).contiguous(); }

}  // namespace

void fold_rows_cpu(const at::Tensor& U, const at::Tensor& start, const at::Tensor& s, const at::Tensor& o,
                   const at::Tensor& D, int64_t begin, int64_t end) {
  const int64_t r = U.size(1);
  const bool done = take_vectors(U.scalar_type(), [&](const auto& loops, auto number) {
    using T = decltype(number);
    loops.fold(static_cast<const T*>(U.const_data_ptr()), start.const_data_ptr<float>(), s.const_data_ptr<float>(),
               o.const_data_ptr<float>(), static_cast<T*>(D.mutable_data_ptr()), begin, end, r);
  });
  if (done) return;
  with_number(U.scalar_type(), [&](auto number) {
    using T = decltype(number);
    using A = core::accumulate_t<T>;
    cpu::fold_rows(U.const_data_ptr<T>(), start.const_data_ptr<A>(), s.const_data_ptr<A>(), o.const_data_ptr<A>(),
                   D.mutable_data_ptr<T>(), begin, end, r);
  });
}

at::Tensor fold_cpu(const at::Tensor& U, const at::Tensor& S0, const at::Tensor& s, const at::Tensor& o) {
  auto D = at::empty_like(U);
  const auto start = at::add(S0, s);
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, U.size(1)));
  at::parallel_for(0, U.size(0), grain,
                   [&](int64_t begin, int64_t end) { fold_rows_cpu(U, start, s, o, D, begin, end); });
  return D;
}

std::tuple<at::Tensor, at::Tensor> fold_backward_cpu(const at::Tensor& U, const at::Tensor& P, const at::Tensor& S0,
                                                     const at::Tensor& s, const at::Tensor& o, bool need_s,
                                                     bool need_o) {
  const int64_t d = U.size(0), r = U.size(1);
  const int64_t partials = (d + kRowsPerPartial - 1) / kRowsPerPartial;
  const auto start = at::add(S0, s);
  auto partial = at::zeros({need_s ? partials : 0, r}, P.options());
  auto d_o = at::empty({need_o ? d : 0}, P.options());
  // rows(begin, end, ds) for each partial sum
  const auto each_partial = [&](auto number, const auto& rows) {
    using A = decltype(number);
    at::parallel_for(0, partials, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        rows(b * kRowsPerPartial, std::min(d, (b + 1) * kRowsPerPartial),
             need_s ? partial.mutable_data_ptr<A>() + b * r : nullptr);
      }
    });
  };
  const bool done = take_vectors(U.scalar_type(), [&](const auto& loops, auto number) {
    using T = decltype(number);
    each_partial(float(), [&](int64_t begin, int64_t end, float* ds) {
      loops.backward(static_cast<const T*>(U.const_data_ptr()), P.const_data_ptr<float>(),
                     start.const_data_ptr<float>(), o.const_data_ptr<float>(), ds,
                     need_o ? d_o.mutable_data_ptr<float>() : nullptr, begin, end, r);
    });
  });
  if (!done) {
    with_number(U.scalar_type(), [&](auto number) {
      using T = decltype(number);
      using A = core::accumulate_t<T>;
      each_partial(A(), [&](int64_t begin, int64_t end, A* ds) {
        cpu::fold_backward_rows(U.const_data_ptr<T>(), P.const_data_ptr<A>(), start.const_data_ptr<A>(),
                                o.const_data_ptr<A>(), ds, need_o ? d_o.mutable_data_ptr<A>() : nullptr, begin, end, r);
      });
    });
  }
  return {need_s ? partial.sum(0) : at::empty({0}, P.options()), d_o};
}

at::Tensor fold(const at::Tensor& U, const at::Tensor& S0, const at::Tensor& s, const at::Tensor& o) {
  const OperatorGuard guard(U.device());
  const auto exact = accumulate_type(U.scalar_type());
  const auto u = U.contiguous(), s0 = ready(S0, exact), ds = ready(s, exact), d_o = ready(o, exact);
#ifdef OSORA_CUDA
  if (U.is_cuda()) return fold_cuda(u, s0, ds, d_o);
#endif
  return fold_cpu(u, s0, ds, d_o);
}

std::tuple<at::Tensor, at::Tensor> fold_backward(const at::Tensor& U, const at::Tensor& P, const at::Tensor& S0,
                                                 const at::Tensor& s, const at::Tensor& o, bool need_s, bool need_o) {
  const OperatorGuard guard(U.device());
  const auto exact = accumulate_type(U.scalar_type());
  const auto u = U.contiguous(), p = P.contiguous(), s0 = ready(S0, exact), ds = ready(s, exact), d_o = ready(o, exact);
#ifdef OSORA_CUDA
  if (U.is_cuda()) return fold_backward_cuda(u, p, s0, ds, d_o, need_s, need_o);
#endif
  return fold_backward_cpu(u, p, s0, ds, d_o, need_s, need_o);
}

namespace {

at::Tensor fold_operator(const at::Tensor& U, const at::Tensor& S0, const at::Tensor& s, const at::Tensor& o) {
  check_fold(U, S0, s, o);
  return fold(U, S0, s, o);
}

std::tuple<at::Tensor, at::Tensor> fold_backward_operator(const at::Tensor& U, const at::Tensor& P,
                                                          const at::Tensor& S0, const at::Tensor& s,
                                                          const at::Tensor& o, bool need_s, bool need_o) {
  check_fold_backward(U, P, S0, s, o);
  return fold_backward(U, P, S0, s, o, need_s, need_o);
}

}  // namespace

TORCH_LIBRARY_IMPL(osora, CPU, m) {
  m.impl("fold", &fold_operator);
  m.impl("fold_backward", &fold_backward_operator);
}

#ifdef OSORA_CUDA
TORCH_LIBRARY_IMPL(osora, CUDA, m) {
  m.impl("fold", &fold_operator);
  m.impl("fold_backward", &fold_backward_operator);
}
#endif

}  // namespace osora
