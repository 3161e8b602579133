// SPDX-License-Identifier: Apache-2.0
#include "cpu/skinny.h"

#include "cpu/features.h"

namespace osora::cpu {

const Skinny* skinny() {
#ifdef OSORA_X86_64
  return features().avx512 ? &skinny_avx512 : features().avx2 ? &skinny_avx2 : nullptr;
#else
  return nullptr;
#endif
}

void pack_strips(const float* x, int64_t n, int64_t k, int64_t ldx, int64_t begin, int64_t end, float* packed) {
  for (int64_t strip = begin; strip < end; ++strip) {
    float* const out = packed + strip * k * kStrip;
    const int64_t first = strip * kStrip, count = n - first < kStrip ? n - first : kStrip;
    for (int64_t c = 0; c < kStrip; ++c) {
      for (int64_t l = 0; l < k; ++l) out[l * kStrip + c] = c < count ? x[(first + c) * ldx + l] : 0.0f;
    }
  }
}

}  // namespace osora::cpu
