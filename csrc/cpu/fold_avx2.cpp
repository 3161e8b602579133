// SPDX-License-Identifier: Apache-2.0
#include "cpu/fold_lanes.h"

namespace osora::cpu {

extern const FoldKernels fold_avx2 = kFold;

}  // namespace osora::cpu
