// SPDX-License-Identifier: Apache-2.0
#include "errors.h"

#include <ATen/ATen.h>

#include <cmath>
#include <cstring>

#include "core/philox.h"

namespace osora::rounding {
namespace {

uint64_t bits_of(const at::Tensor& contiguous) {
  const char* const bytes = static_cast<const char*>(contiguous.const_data_ptr());
  uint64_t key = 0;
  for (size_t i = 0; i + 4 <= contiguous.nbytes(); i += 4) {
    uint32_t word;
    std::memcpy(&word, bytes + i, 4);
    key = (key ^ word) * 0x100000001B3ull;
  }
  return key;
}

// The largest entry, so that no square leaves the range of float64, and the lengths along `axis` in units of it.
std::pair<double, at::Tensor> lengths(const at::Tensor& a, int64_t axis) {
  const double largest = a.abs().amax().to(at::kDouble).item<double>();
  const auto unit = largest > 0 ? a.to(at::kDouble) / largest : a.to(at::kDouble);
  return {largest, at::linalg_vector_norm(unit, 2, at::IntArrayRef{axis}, true)};
}

// Independent numbers of the shape of `like`, even in [-1, 1].
at::Tensor evenly(const at::Tensor& like, uint64_t key) {
  auto made = at::empty(like.sizes(), like.options().dtype(at::kDouble));
  double* const out = made.mutable_data_ptr<double>();
  for (int64_t i = 0; i < made.numel(); ++i) {
    out[i] = double(int64_t(core::mix64(key + uint64_t(i)))) * 0x1p-63;
  }
  return made;
}

}  // namespace

void add_errors(uint64_t seed, const at::Tensor& result, const at::Tensor& left, const at::Tensor& right,
                int exponent) {
  if (result.numel() == 0) return;
  const double epsilon = result.scalar_type() == at::kDouble ? 0x1p-52 : 0x1p-23;
  const auto exact = result.contiguous();
  const uint64_t key = core::mixed_key(seed, bits_of(exact));
  const auto [left_unit, rows] = lengths(left, -1);
  const auto [right_unit, columns] = lengths(right, -2);
  const int half = exponent / 2;
  const double size = 0.5 * epsilon * (std::ldexp(left_unit, half) * std::ldexp(right_unit, exponent - half));
  const auto sums = evenly(exact, key) * rows * columns * size;
  const auto last = evenly(exact, ~key) * exact.to(at::kDouble) * (2 * epsilon);
  result.copy_(exact.to(at::kDouble) + sums + last);
}

}  // namespace osora::rounding
