// SPDX-License-Identifier: Apache-2.0
// P = a^T h for two tall bfloat16 matrices, summed in float32, on AMX tiles, without float32 copies of them.
#pragma once
#include <cstdint>

namespace osora::cpu {

constexpr int64_t kOuterColumns = 32;  // of a, that are worked on at a time

// h [n, r], its rows ldh apart -> tiles for outer_amx: outer_packed_size(n, r) numbers, 64-byte aligned.
int64_t outer_packed_size(int64_t n, int64_t r);
void outer_pack(const uint16_t* h, int64_t n, int64_t r, int64_t ldh, uint16_t* packed);

// Columns [begin, end) of a [n, d], rows lda apart, begin a multiple of kOuterColumns -> rows [begin, end) of p [d, r],
// written. scratch: outer_scratch_size() numbers, 64-byte aligned. bfloat16 as bits. Needs features().amx.
int64_t outer_scratch_size();
void outer_amx(const uint16_t* a, int64_t n, int64_t lda, const uint16_t* packed, int64_t r, int64_t begin, int64_t end,
               uint16_t* scratch, float* p);

}  // namespace osora::cpu
