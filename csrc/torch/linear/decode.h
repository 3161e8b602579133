// SPDX-License-Identifier: Apache-2.0
// The linear operator's way for a few rows (core/linear_plan.h: kDecode): y and h from two kernels, without a fold.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

#include "core/linear_plan.h"
#include "torch/common/checks.h"

namespace osora {

// All on one card, checked and contiguous; S0, s and o have the dtype of sums. One adapter: s [r], o [d]. Several:
// s [A, r], o [A, d] and index [n] (int64, -1 is the base model), with ranks [A] (int64) or none.
struct DecodeInputs {
  at::Tensor x;  // [n, k], at most core::kMaxDecodeRows rows
  std::optional<at::Tensor> weight, bias;
  at::Tensor U, V, S0, s, o;
  std::optional<at::Tensor> ranks, index;
};

inline DecodeInputs decode_inputs(const at::Tensor& rows, const std::optional<at::Tensor>& weight,
                                  const std::optional<at::Tensor>& bias, const at::Tensor& U, const at::Tensor& V,
                                  const at::Tensor& S0, const at::Tensor& s, const at::Tensor& o,
                                  const std::optional<at::Tensor>& ranks, const std::optional<at::Tensor>& index) {
  const auto exact = accumulate_type(rows.scalar_type());
  const auto contiguous = [](const std::optional<at::Tensor>& t) {
    return t ? std::optional<at::Tensor>(t->contiguous()) : std::nullopt;
  };
  const auto ready = [&](const at::Tensor& t) { return t.to(exact).contiguous(); };
  return {rows.contiguous(), contiguous(weight), contiguous(bias), U.contiguous(),    V.contiguous(),
          ready(S0),         ready(s),           ready(o),         contiguous(ranks), contiguous(index)};
}

// Whether the operator decodes rows [n, k] with these frozen tensors.
inline core::LinearPlan plan_linear(const at::Tensor& rows, const std::optional<at::Tensor>& weight,
                                    const at::Tensor& U, const at::Tensor& V) {
  const bool row_major = (!weight || weight->is_contiguous()) && U.is_contiguous() && V.is_contiguous();
  return core::linear_plan(rows.size(0), U.size(0), V.size(0), U.size(1), rows.is_cuda(), row_major);
}

}  // namespace osora
