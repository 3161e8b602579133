// SPDX-License-Identifier: Apache-2.0
// Found before the real <cuda_fp16.h>: binary16 in software, with the rounding and the NaN of the PTX conversion
// cvt.rn.f16.f32. 1 sign, 5 exponent (bias 15), 10 mantissa bits; subnormals are multiples of 2^-24.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, exponent = x.bits >> 10 & 0x1fu, mantissa = x.bits & 0x3ffu;
  if (exponent == 0) return std::copysign(static_cast<float>(mantissa) * 0x1p-24f, std::bit_cast<float>(sign));
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | mantissa << 13);  // infinity, NaN
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);           // 112 = 127 - 15
}

inline __half __float2half_rn(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return {0x7fff};                                  // NaN
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // from 65520 on: infinity
  // Shift the 24-bit significand so that its unit is a unit of the result, keeping what falls off for the rounding.
  const uint32_t exponent = magnitude >> 23;
  const bool normal = exponent >= 113;  // 2^-14
  const uint32_t shift = normal ? 13 : 126 - exponent;
  if (shift > 24) return {sign};  // below half of the least subnormal
  const uint32_t significand = (magnitude & 0x7fffffu) | 0x800000u;
  const uint32_t kept = significand >> shift, lost = significand & ((1u << shift) - 1), half = 1u << (shift - 1);
  // A carry out of the mantissa moves into the exponent, which is what it means.
  const uint32_t rounded = kept + (lost > half || (lost == half && (kept & 1)));
  return {static_cast<uint16_t>(sign | (normal ? rounded + ((exponent - 113) << 10) : rounded))};
}
