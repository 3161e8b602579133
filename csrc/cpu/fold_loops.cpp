// SPDX-License-Identifier: Apache-2.0
#include "cpu/fold_loops.h"

#include "cpu/features.h"

namespace osora::cpu {

const FoldKernels* fold_kernels() {
#ifdef OSORA_X86_64
  return features().avx512 ? &fold_avx512 : features().avx2 ? &fold_avx2 : nullptr;
#else
  return nullptr;
#endif
}

}  // namespace osora::cpu
