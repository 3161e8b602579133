// SPDX-License-Identifier: Apache-2.0
#include "cpu/fold_lanes.h"

namespace osora::cpu {

extern const FoldKernels fold_avx512 = kFold;

}  // namespace osora::cpu
