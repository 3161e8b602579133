// SPDX-License-Identifier: Apache-2.0
// One check per operator, shared by every backend: a wrong call fails with the same words on CPU, CUDA and in the
// emulator. Messages name the operator, the argument, what is wished and what came.
#pragma once
#include <ATen/core/Tensor.h>

namespace osora {

inline bool is_supported_float(at::ScalarType type) {
  return type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

// The dtype of S0, P and every sum: float64 for float64 factors, float32 otherwise.
inline at::ScalarType accumulate_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

inline void check_factors(const char* op, const at::Tensor& U, const at::Tensor& S0, const at::Tensor& s,
                          const at::Tensor& o) {
  TORCH_CHECK(U.dim() == 2, op, ": U must be [out_features, rank], got shape ", U.sizes());
  TORCH_CHECK(is_supported_float(U.scalar_type()), op, ": U must be float64, float32, bfloat16 or float16, got ",
              U.scalar_type());
  TORCH_CHECK(S0.dim() == 1 && S0.size(0) == U.size(1), op, ": S0 must be [rank] = [", U.size(1), "], got shape ",
              S0.sizes());
  TORCH_CHECK(s.dim() == 1 && s.size(0) == U.size(1), op, ": s must be [rank] = [", U.size(1), "], got shape ",
              s.sizes());
  TORCH_CHECK(o.dim() == 1 && o.size(0) == U.size(0), op, ": o must be [out_features] = [", U.size(0), "], got shape ",
              o.sizes());
  const auto exact = accumulate_type(U.scalar_type());
  TORCH_CHECK(S0.scalar_type() == exact, op, ": S0 must be ", exact, " for ", U.scalar_type(),
              " factors (rounded singular values would shift the starting point), got ", S0.scalar_type());
  for (const auto* delta : {&s, &o}) {
    const auto type = delta->scalar_type();
    TORCH_CHECK(type == exact || type == at::kBFloat16 || type == at::kHalf, op, ": ", delta == &s ? "s" : "o",
                " must be ", exact, ", bfloat16 or float16, got ", type);
  }
  TORCH_CHECK(S0.device() == U.device() && s.device() == U.device() && o.device() == U.device(), op,
              ": U, S0, s and o must be on one device, got ", U.device(), ", ", S0.device(), ", ", s.device(), " and ",
              o.device());
}

inline void check_fold(const at::Tensor& U, const at::Tensor& S0, const at::Tensor& s, const at::Tensor& o) {
  check_factors("osora::fold", U, S0, s, o);
}

inline void check_fold_backward(const at::Tensor& U, const at::Tensor& P, const at::Tensor& S0, const at::Tensor& s,
                                const at::Tensor& o) {
  check_factors("osora::fold_backward", U, S0, s, o);
  TORCH_CHECK(P.sizes() == U.sizes(), "osora::fold_backward: P must have U's shape ", U.sizes(), ", got ", P.sizes());
  TORCH_CHECK(P.scalar_type() == accumulate_type(U.scalar_type()), "osora::fold_backward: P must be ",
              accumulate_type(U.scalar_type()), " for ", U.scalar_type(), " factors, got ", P.scalar_type());
  TORCH_CHECK(P.device() == U.device(), "osora::fold_backward: P must be on ", U.device(), ", got ", P.device());
}

// What `linear` and `linear_backward` share: the frozen tensors among themselves, and `rows` (x or dy) against them.
inline void check_linear_frozen(const char* op, const at::Tensor& rows, const std::optional<at::Tensor>& weight,
                                const at::Tensor& U, const at::Tensor& V, const at::Tensor& S0, const at::Tensor& s,
                                const at::Tensor& o) {
  check_factors(op, U, S0, s, o);
  TORCH_CHECK(V.dim() == 2 && V.size(1) == U.size(1), op, ": V must be [in_features, rank] with rank ", U.size(1),
              ", got shape ", V.sizes());
  TORCH_CHECK(!weight || (weight->dim() == 2 && weight->size(0) == U.size(0) && weight->size(1) == V.size(0)), op,
              ": weight must be [out_features, in_features] = [", U.size(0), ", ", V.size(0), "], got shape ",
              weight ? weight->sizes() : at::IntArrayRef{});
  TORCH_CHECK(rows.scalar_type() == U.scalar_type() && V.scalar_type() == U.scalar_type() &&
                  (!weight || weight->scalar_type() == U.scalar_type()),
              op, ": the input, weight, U and V must share one dtype, got ", rows.scalar_type(), ", ",
              weight ? at::toString(weight->scalar_type()) : "none", ", ", U.scalar_type(), " and ", V.scalar_type(),
              " (under autocast, call osora.ops.linear, which casts them)");
  TORCH_CHECK(rows.device() == U.device() && V.device() == U.device() && (!weight || weight->device() == U.device()),
              op, ": the input, weight, U and V must be on one device, got ", rows.device(), ", ",
              weight ? weight->device() : U.device(), ", ", U.device(), " and ", V.device());
}

inline void check_linear(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                         const std::optional<at::Tensor>& bias, const at::Tensor& U, const at::Tensor& V,
                         const at::Tensor& S0, const at::Tensor& s, const at::Tensor& o) {
  check_linear_frozen("osora::linear", x, weight, U, V, S0, s, o);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == V.size(0),
              "osora::linear: the last dimension of x must be in_features = ", V.size(0), ", got shape ", x.sizes());
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == U.size(0)),
              "osora::linear: bias must be [out_features] = [", U.size(0), "], got shape ",
              bias ? bias->sizes() : at::IntArrayRef{});
  TORCH_CHECK(!bias || (bias->scalar_type() == x.scalar_type() && bias->device() == x.device()),
              "osora::linear: bias must have x's dtype and device (", x.scalar_type(), " on ", x.device(), "), got ",
              bias ? at::toString(bias->scalar_type()) : "none");
  TORCH_CHECK(weight || !bias,
              "osora::linear: a bias needs a weight (without one, only the adapter's branch is given)");
}

inline void check_down(const at::Tensor& x, const at::Tensor& V) {
  TORCH_CHECK(V.dim() == 2, "osora::down: V must be [in_features, rank], got shape ", V.sizes());
  TORCH_CHECK(is_supported_float(V.scalar_type()), "osora::down: V must be float64, float32, bfloat16 or float16, got ",
              V.scalar_type());
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == V.size(0),
              "osora::down: the last dimension of x must be in_features = ", V.size(0), ", got shape ", x.sizes());
  TORCH_CHECK(x.scalar_type() == V.scalar_type() && x.device() == V.device(),
              "osora::down: x must have V's dtype and device (", V.scalar_type(), " on ", V.device(), "), got ",
              x.scalar_type(), " on ", x.device());
}

// x, weight and bias as check_linear has them, with h in V's place.
inline void check_up(const at::Tensor& x, const at::Tensor& h, const std::optional<at::Tensor>& weight,
                     const std::optional<at::Tensor>& bias, const at::Tensor& U, const at::Tensor& S0,
                     const at::Tensor& s, const at::Tensor& o) {
  check_factors("osora::up", U, S0, s, o);
  TORCH_CHECK(x.dim() >= 1, "osora::up: x must be [..., in_features], got shape ", x.sizes());
  int64_t n = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) n *= x.size(i);
  TORCH_CHECK(h.dim() == 2 && h.size(0) == n && h.size(1) == U.size(1), "osora::up: h must be [n, rank] = [", n, ", ",
              U.size(1), "], got shape ", h.sizes());
  TORCH_CHECK(!weight || (weight->dim() == 2 && weight->size(0) == U.size(0) && weight->size(1) == x.size(-1)),
              "osora::up: weight must be [out_features, in_features] = [", U.size(0), ", ", x.size(-1), "], got shape ",
              weight ? weight->sizes() : at::IntArrayRef{});
  TORCH_CHECK(!bias || (weight && bias->dim() == 1 && bias->size(0) == U.size(0)),
              "osora::up: bias must be [out_features] = [", U.size(0), "], and needs a weight, got shape ",
              bias ? bias->sizes() : at::IntArrayRef{});
  for (const auto* t : {&x, &h, weight ? &*weight : &x, bias ? &*bias : &x}) {
    TORCH_CHECK(t->scalar_type() == U.scalar_type() && t->device() == U.device(),
                "osora::up: x, h, weight, bias and U must share one dtype and device (", U.scalar_type(), " on ",
                U.device(), "), got ", t->scalar_type(), " on ", t->device());
  }
}

inline void check_linear_backward(const at::Tensor& dy, const at::Tensor& h, const std::optional<at::Tensor>& weight,
                                  const at::Tensor& U, const at::Tensor& V, const at::Tensor& S0, const at::Tensor& s,
                                  const at::Tensor& o) {
  check_linear_frozen("osora::linear_backward", dy, weight, U, V, S0, s, o);
  TORCH_CHECK(dy.dim() >= 1 && dy.size(-1) == U.size(0),
              "osora::linear_backward: the last dimension of dy must be out_features = ", U.size(0), ", got shape ",
              dy.sizes());
  TORCH_CHECK(h.dim() == 2 && h.size(1) == U.size(1) && h.size(0) * dy.size(-1) == dy.numel(),
              "osora::linear_backward: h must be [n, rank] = [", dy.size(-1) ? dy.numel() / dy.size(-1) : h.size(0),
              ", ", U.size(1), "], got shape ", h.sizes());
  TORCH_CHECK(h.scalar_type() == dy.scalar_type() && h.device() == dy.device(),
              "osora::linear_backward: h must have dy's dtype and device, got ", h.scalar_type(), " on ", h.device());
}

}  // namespace osora
