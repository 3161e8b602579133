// SPDX-License-Identifier: Apache-2.0
// Found before the real <cuda_bf16.h>: bfloat16 in software, with the rounding and the NaN of the PTX conversion
// cvt.rn.bf16.f32.
#pragma once
#include <bit>
#include <cstdint>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};  // NaN
  const uint32_t even = bits >> 16 & 1;                     // a tie goes to the even neighbour
  return {static_cast<uint16_t>((bits + 0x7fffu + even) >> 16)};
}
