// SPDX-License-Identifier: Apache-2.0
// The power of two that the SVDs divide a weight by, so that weights of size 1e-30 and 1e+30 are decomposed like their
// scaled twins. A power of two changes no digit.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/aminmax.h>

#include <algorithm>
#include <cmath>

namespace osora {

// t *= 2^exponent, in place: two factors, since 2^exponent itself may not fit t's dtype.
inline at::Tensor scale_by(at::Tensor t, int exponent) {
  const int half = exponent / 2;
  return t.mul_(std::ldexp(1.0, half)).mul_(std::ldexp(1.0, exponent - half));
}

// The exponent with largest entry = 2^exponent times a number in [1/2, 1); 0 for a zero matrix. A ValueError where an
// entry is NaN or infinite. Waits for the device.
inline int scale_exponent(const at::Tensor& weight) {
  const auto [low, high] = at::aminmax(weight);  // both are NaN if any entry is
  const double largest = std::max(-low.to(at::kDouble).item<double>(), high.to(at::kDouble).item<double>());
  TORCH_CHECK_VALUE(std::isfinite(largest), "osora::truncated_svd: a weight has NaN or infinite entries");
  int exponent = 0;
  std::frexp(largest, &exponent);
  return exponent;
}

}  // namespace osora
