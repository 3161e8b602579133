// SPDX-License-Identifier: Apache-2.0
// Many adapters in one batch. They share U, V, S0 and the base weight, so that every product runs over the whole batch
// and only two small steps (multi.h) know whose row it is: the time hardly depends on how many adapters there are.
#include <ATen/core/Tensor.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "torch/common/checks.h"
#include "torch/common/guards.h"
#include "torch/linear/multi.h"
#include "torch/linear/products.h"
#include "torch/linear/rows.h"

namespace osora {
namespace {

using Optional = std::optional<at::Tensor>;

// index [a prefix of x's leading dimensions] -> [n]: an adapter per sequence is one for each of its tokens.
at::Tensor index_of_rows(const at::Tensor& index, const at::Tensor& x) {
  auto sizes = index.sizes().vec();
  sizes.resize(x.dim() - 1, 1);
  return index.reshape(sizes).expand(x.sizes().slice(0, x.dim() - 1)).reshape({-1}).contiguous();
}

at::Tensor linear_multi(const at::Tensor& x, const Optional& weight, const Optional& bias, const at::Tensor& U,
                        const at::Tensor& V, const at::Tensor& S0, const at::Tensor& s, const at::Tensor& o,
                        const at::Tensor& index, const Optional& ranks) {
  check_linear_multi(x, weight, bias, U, V, S0, s, o, index, ranks);
  const OperatorGuard guard(x.device());
  const auto rows = as_rows(x);
  const auto adapters = index_of_rows(index, x);
  // torch's own linear, on x as it came, so that rows of the base have its very bits.
  auto y = weight ? at::linear(x, *weight, bias).contiguous() : at::zeros(with_last(x, U.size(0)), x.options());
  const auto t = at::mm(multi_scale(down_product(rows, V), S0, s, ranks, adapters), U.t());
  auto y_rows = y.view({rows.size(0), U.size(0)});
  multi_combine(y_rows, t, o, adapters);
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(osora, CPU, m) { m.impl("linear_multi", &linear_multi); }

#ifdef OSORA_CUDA
TORCH_LIBRARY_IMPL(osora, CUDA, m) { m.impl("linear_multi", &linear_multi); }
#endif

}  // namespace osora
