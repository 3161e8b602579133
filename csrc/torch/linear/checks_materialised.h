// SPDX-License-Identifier: Apache-2.0
// The checks of the operators on a materialised weight, as checks.h has them for the others.
#pragma once
#include <ATen/core/Tensor.h>

#include "torch/common/checks.h"

namespace osora {

// The sources of W_eff among themselves, and the dtype it is wished in.
inline void check_effective(const char* op, at::ScalarType type, const at::Tensor& weight, const at::Tensor& U,
                            const at::Tensor& V, const at::Tensor& S0, const at::Tensor& s, const at::Tensor& o) {
  check_linear_frozen(op, U, weight, U, V, S0, s, o);
  const bool half = type == at::kBFloat16 || type == at::kHalf;
  TORCH_CHECK(type == U.scalar_type() || (half && U.scalar_type() != at::kDouble), op,
              ": the input must have the weight's dtype ", U.scalar_type(),
              ", or bfloat16 or float16 as under autocast (not for a float64 weight), got ", type);
}

inline void check_linear_effective(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                   const at::Tensor& U, const at::Tensor& V, const at::Tensor& S0, const at::Tensor& s,
                                   const at::Tensor& o) {
  const char* const op = "osora::linear_effective";
  check_effective(op, x.scalar_type(), weight, U, V, S0, s, o);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == V.size(0), op,
              ": the last dimension of x must be in_features = ", V.size(0), ", got shape ", x.sizes());
  TORCH_CHECK(x.device() == U.device(), op, ": x must be on ", U.device(), ", got ", x.device());
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == U.size(0)), op, ": bias must be [out_features] = [",
              U.size(0), "], got shape ", bias ? bias->sizes() : at::IntArrayRef{});
  TORCH_CHECK(!bias || (bias->scalar_type() == x.scalar_type() && bias->device() == x.device()), op,
              ": bias must have x's dtype and device (", x.scalar_type(), " on ", x.device(), "), got ",
              bias ? at::toString(bias->scalar_type()) : "none");
}

inline void check_linear_effective_backward(const at::Tensor& dy, const at::Tensor& h, const at::Tensor& weight,
                                            const at::Tensor& U, const at::Tensor& V, const at::Tensor& S0,
                                            const at::Tensor& s, const at::Tensor& o, bool need_h) {
  const char* const op = "osora::linear_effective_backward";
  check_effective(op, dy.scalar_type(), weight, U, V, S0, s, o);
  TORCH_CHECK(dy.dim() >= 1 && dy.size(-1) == U.size(0), op,
              ": the last dimension of dy must be out_features = ", U.size(0), ", got shape ", dy.sizes());
  TORCH_CHECK(dy.device() == U.device(), op, ": dy must be on ", U.device(), ", got ", dy.device());
  if (!need_h) return;
  int64_t n = 1;
  for (int64_t i = 0; i + 1 < dy.dim(); ++i) n *= dy.size(i);
  TORCH_CHECK(h.dim() == 2 && h.size(0) == n && h.size(1) == U.size(1), op, ": h must be [n, rank] = [", n, ", ",
              U.size(1), "], got shape ", h.sizes());
  TORCH_CHECK(h.scalar_type() == dy.scalar_type() && h.device() == dy.device(), op,
              ": h must have dy's dtype and device, got ", h.scalar_type(), " on ", h.device());
}

}  // namespace osora
