// SPDX-License-Identifier: Apache-2.0
// Which of our loops this processor runs. They are compiled once per instruction set and chosen at run time.
#pragma once

namespace osora::cpu {

struct Features {
  bool avx2 = false;    // and FMA
  bool avx512 = false;  // F, VL, BW
  bool amx = false;     // tiles of bfloat16, granted by the kernel; and avx512
};

// Asked once. torch's ATEN_CPU_CAPABILITY=default or avx2 holds our loops back as it does torch's.
const Features& features();

}  // namespace osora::cpu
