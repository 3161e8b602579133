// SPDX-License-Identifier: Apache-2.0
// The checks of SORSA's operators, as checks.h has them for the others.
#pragma once
#include <ATen/core/Tensor.h>

#include <tuple>

#include "torch/common/checks.h"

namespace osora {

inline void check_sorsa(const char* op, const at::Tensor& rows, const std::optional<at::Tensor>& weight,
                        const at::Tensor& U0, const at::Tensor& S0, const at::Tensor& V0, const at::Tensor& u,
                        const at::Tensor& s, const at::Tensor& v) {
  TORCH_CHECK(U0.dim() == 2 && is_supported_float(U0.scalar_type()), op,
              ": U0 must be [out_features, rank] in float64, float32, bfloat16 or float16, got shape ", U0.sizes(),
              " in ", U0.scalar_type());
  TORCH_CHECK(V0.dim() == 2 && V0.size(1) == U0.size(1), op, ": V0 must be [in_features, rank] with rank ", U0.size(1),
              ", got shape ", V0.sizes());
  TORCH_CHECK(S0.dim() == 1 && S0.size(0) == U0.size(1), op, ": S0 must be [rank] = [", U0.size(1), "], got shape ",
              S0.sizes());
  const auto exact = accumulate_type(U0.scalar_type());
  TORCH_CHECK(S0.scalar_type() == exact, op, ": S0 must be ", exact, " for ", U0.scalar_type(),
              " factors (rounded singular values would shift the starting point), got ", S0.scalar_type());
  const std::tuple<const char*, const at::Tensor*, const at::Tensor*> deltas[] = {
      {"u", &u, &U0}, {"s", &s, &S0}, {"v", &v, &V0}};
  for (const auto& [name, delta, of] : deltas) {
    TORCH_CHECK(delta->sizes() == of->sizes(), op, ": ", name, " must be ", of->sizes(), " as what it changes, got ",
                delta->sizes());
    const auto type = delta->scalar_type();
    TORCH_CHECK(type == exact || type == at::kBFloat16 || type == at::kHalf, op, ": ", name, " must be ", exact,
                ", bfloat16 or float16, got ", type);
  }
  TORCH_CHECK(!weight || (weight->dim() == 2 && weight->size(0) == U0.size(0) && weight->size(1) == V0.size(0)), op,
              ": weight must be [out_features, in_features] = [", U0.size(0), ", ", V0.size(0), "], got shape ",
              weight ? weight->sizes() : at::IntArrayRef{});
  TORCH_CHECK(rows.scalar_type() == U0.scalar_type() && V0.scalar_type() == U0.scalar_type() &&
                  (!weight || weight->scalar_type() == U0.scalar_type()),
              op, ": the input, weight, U0 and V0 must share one dtype, got ", rows.scalar_type(), ", ",
              weight ? at::toString(weight->scalar_type()) : "none", ", ", U0.scalar_type(), " and ", V0.scalar_type(),
              " (under autocast, call osora.ops.sorsa_linear, which casts them)");
  for (const auto* t : {weight ? &*weight : &rows, &U0, &S0, &V0, &u, &s, &v}) {
    TORCH_CHECK(t->device() == rows.device(), op, ": all must be on one device, got ", rows.device(), " and ",
                t->device());
  }
}

inline void check_sorsa_linear(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                               const std::optional<at::Tensor>& bias, const at::Tensor& U0, const at::Tensor& S0,
                               const at::Tensor& V0, const at::Tensor& u, const at::Tensor& s, const at::Tensor& v) {
  const char* const op = "osora::sorsa_linear";
  check_sorsa(op, x, weight, U0, S0, V0, u, s, v);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == V0.size(0), op,
              ": the last dimension of x must be in_features = ", V0.size(0), ", got shape ", x.sizes());
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == U0.size(0)), op, ": bias must be [out_features] = [",
              U0.size(0), "], got shape ", bias ? bias->sizes() : at::IntArrayRef{});
  TORCH_CHECK(!bias || (bias->scalar_type() == x.scalar_type() && bias->device() == x.device()), op,
              ": bias must have x's dtype and device (", x.scalar_type(), " on ", x.device(), "), got ",
              bias ? at::toString(bias->scalar_type()) : "none");
  TORCH_CHECK(weight || !bias, op, ": a bias needs a weight (without one, only the adapter's branch is given)");
}

inline void check_sorsa_backward(const at::Tensor& dy, const std::optional<at::Tensor>& x,
                                 const std::optional<at::Tensor>& h, const std::optional<at::Tensor>& weight,
                                 const at::Tensor& U0, const at::Tensor& S0, const at::Tensor& V0, const at::Tensor& u,
                                 const at::Tensor& s, const at::Tensor& v, bool need_triplet, bool need_v) {
  const char* const op = "osora::sorsa_linear_backward";
  check_sorsa(op, dy, weight, U0, S0, V0, u, s, v);
  TORCH_CHECK(dy.dim() >= 1 && dy.size(-1) == U0.size(0), op,
              ": the last dimension of dy must be out_features = ", U0.size(0), ", got shape ", dy.sizes());
  TORCH_CHECK(h || !need_triplet, op, ": h is needed for the gradients of u and s");
  TORCH_CHECK(x || !need_v, op, ": x is needed for the gradient of v");
  auto wish = dy.sizes().vec();
  wish.back() = V0.size(0);
  TORCH_CHECK(!x || x->sizes() == wish, op, ": x must be dy's shape with in_features at the end, ",
              at::IntArrayRef(wish), ", got ", x ? x->sizes() : at::IntArrayRef{});
  int64_t n = 1;
  for (int64_t i = 0; i + 1 < dy.dim(); ++i) n *= dy.size(i);
  TORCH_CHECK(!h || (h->dim() == 2 && h->size(0) == n && h->size(1) == U0.size(1)), op, ": h must be [n, rank] = [", n,
              ", ", U0.size(1), "], got shape ", h ? h->sizes() : at::IntArrayRef{});
  for (const auto* t : {&x, &h}) {
    TORCH_CHECK(!*t || ((*t)->scalar_type() == dy.scalar_type() && (*t)->device() == dy.device()), op,
                ": x and h must have dy's dtype and device (", dy.scalar_type(), " on ", dy.device(), ")");
  }
}

}  // namespace osora
