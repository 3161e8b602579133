// SPDX-License-Identifier: Apache-2.0
#include "cpu/skinny.h"

namespace osora::cpu {

const Skinny* skinny() {
#ifdef OSORA_X86_64
  static const Skinny* const best = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")
                                        ? &skinny_avx512
                                    : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &skinny_avx2
                                                                                                      : nullptr;
  return best;
#else
  return nullptr;
#endif
}

}  // namespace osora::cpu
