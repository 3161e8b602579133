// SPDX-License-Identifier: Apache-2.0
// The loops of cpu/fold.h for float32 and bfloat16 in vectors. bfloat16 numbers are their bits here.
#pragma once
#include <cstdint>

namespace osora::cpu {

template <class T>
struct FoldLoops {
  // As fold_rows.
  void (*fold)(const T* u, const float* start, const float* s, const float* o, T* out, int64_t begin, int64_t end,
               int64_t r);
  // As fold_backward_rows.
  void (*backward)(const T* u, const float* p, const float* start, const float* o, float* ds, float* d_o, int64_t begin,
                   int64_t end, int64_t r);
};

struct FoldKernels {
  FoldLoops<float> float32;
  FoldLoops<uint16_t> bfloat16;
};

// The best for this processor, or null: the caller then takes the loops of cpu/fold.h.
const FoldKernels* fold_kernels();

// One per translation unit, compiled for its instruction set.
extern const FoldKernels fold_avx2, fold_avx512;

}  // namespace osora::cpu
