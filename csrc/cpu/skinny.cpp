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

}  // namespace osora::cpu
