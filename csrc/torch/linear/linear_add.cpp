// SPDX-License-Identifier: Apache-2.0
// The adapter's branch added to a given y in place: for bases that own their product (quantised ones cannot
// accumulate), and for layers whose base and branch see another x. One source serves CPU and CUDA.
#include <ATen/TensorUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <utility>

#include "torch/common/checks.h"
#include "torch/common/guards.h"
#include "torch/fold/fold.h"
#include "torch/linear/products.h"
#include "torch/linear/rows.h"

namespace osora {
namespace {

using Signature = at::Tensor(at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                             const at::Tensor&, const at::Tensor&);

// y[..., d] += h D^T. Rows with any distance between them are added to where they are; a y that no matrix describes
// (its features apart, or its batch permuted) goes through a contiguous copy, to the same bits.
void add_product(const at::Tensor& y, const at::Tensor& h, const at::Tensor& D) {
  const int64_t n = h.size(0), d = D.size(0);
  if (y.numel() == 0) return;
  const auto strides = at::detail::computeStride(y.sizes(), y.strides(), at::IntArrayRef{n, d});
  const bool rows = strides && (*strides)[1] == 1 && (*strides)[0] >= std::max<int64_t>(1, d);
  const bool columns = strides && (*strides)[0] == 1 && (*strides)[1] >= std::max<int64_t>(1, n);
  if (rows || columns) {
    y.view({n, d}).addmm_(h, D.t());
  } else {
    auto sum = y.clone(at::MemoryFormat::Contiguous);
    sum.view({n, d}).addmm_(h, D.t());
    y.copy_(sum);
  }
}

at::Tensor linear_add_(at::Tensor& y, const at::Tensor& x, const at::Tensor& U, const at::Tensor& V,
                       const at::Tensor& S0, const at::Tensor& s, const at::Tensor& o) {
  check_linear_add(y, x, U, V, S0, s, o);
  const OperatorGuard guard(x.device());
  auto h = down_product(as_rows(x), V);
  add_product(y, h, fold(U, S0, s, o));
  // The guard hides the writes above from autograd; whoever saved y must hear of them.
  y.unsafeGetTensorImpl()->bump_version();
  return h;
}

// torch registers no derivative for an operator that writes to an argument: osora.ops.linear_add_ has one around this.
// Called by itself where a gradient is asked for, it would lose that gradient without a word.
at::Tensor linear_add_autograd(c10::DispatchKeySet keys, at::Tensor& y, const at::Tensor& x, const at::Tensor& U,
                               const at::Tensor& V, const at::Tensor& S0, const at::Tensor& s, const at::Tensor& o) {
  for (const auto* t : {&std::as_const(y), &x, &U, &V, &S0, &s, &o}) {
    TORCH_CHECK(!at::GradMode::is_enabled() || !t->requires_grad(),
                "torch.ops.osora.linear_add_ has no derivative: call osora.ops.linear_add_, which has one");
  }
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("osora::linear_add_", "").typed<Signature>();
  const at::AutoDispatchBelowAutograd guard;
  return op.redispatch(keys & c10::after_autograd_keyset, y, x, U, V, S0, s, o);
}

}  // namespace

TORCH_LIBRARY_IMPL(osora, CPU, m) { m.impl("linear_add_", &linear_add_); }
TORCH_LIBRARY_IMPL(osora, Autograd, m) { m.impl("linear_add_", &linear_add_autograd); }

#ifdef OSORA_CUDA
TORCH_LIBRARY_IMPL(osora, CUDA, m) { m.impl("linear_add_", &linear_add_); }
#endif

}  // namespace osora
