// SPDX-License-Identifier: Apache-2.0
// The loops of fold_loops.h, 16 numbers at a time. Included once in each translation unit, which is compiled for one
// instruction set; so everything is local to it, and no library header with inline code is included. Sixteen lanes on
// every processor: sums have one order, with and without AVX-512.
#pragma once
#include <cstdint>
#include <cstring>

#include "cpu/fold_loops.h"

namespace osora::cpu {
namespace {

constexpr int64_t kLanes = 16;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

template <class T>
inline __attribute__((always_inline)) void load_part(const T* p, int64_t count, Floats& v);

template <>
inline __attribute__((always_inline)) void load_part(const float* p, int64_t count, Floats& v) {
  v = Floats{};
  if (count >= kLanes) {
    std::memcpy(&v, p, sizeof v);
  } else {
    std::memcpy(&v, p, sizeof(float) * size_t(count));
  }
}

// A bfloat16 number is the upper half of a float32.
template <>
inline __attribute__((always_inline)) void load_part(const uint16_t* p, int64_t count, Floats& v) {
  Halves bits{};
  if (count >= kLanes) {
    std::memcpy(&bits, p, sizeof bits);
  } else {
    std::memcpy(&bits, p, sizeof(uint16_t) * size_t(count));
  }
  const Words words = __builtin_convertvector(bits, Words) << 16;
  std::memcpy(&v, &words, sizeof v);
}

inline __attribute__((always_inline)) void store_part(float* p, int64_t count, const Floats& v) {
  if (count >= kLanes) {
    std::memcpy(p, &v, sizeof v);
  } else {
    std::memcpy(p, &v, sizeof(float) * size_t(count));
  }
}

// To the nearest, ties to even; NaN stays NaN.
inline __attribute__((always_inline)) void store_part(uint16_t* p, int64_t count, const Floats& v) {
  Words words;
  std::memcpy(&words, &v, sizeof words);
  const Words nearest = (words + 0x7fffu + ((words >> 16) & 1u)) >> 16;
  const Words magnitude = words & 0x7fffffffu;
  const Halves bits = __builtin_convertvector(magnitude > 0x7f800000u ? (words >> 16) | 0x40u : nearest, Halves);
  if (count >= kLanes) {
    std::memcpy(p, &bits, sizeof bits);
  } else {
    std::memcpy(p, &bits, sizeof(uint16_t) * size_t(count));
  }
}

template <class T>
void fold_lanes(const T* u, const float* start, const float* s, const float* o, T* out, int64_t begin, int64_t end,
                int64_t r) {
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t j = 0; j < r; j += kLanes) {
      Floats left, first, change;
      load_part(u + i * r + j, r - j, left);
      load_part(start + j, r - j, first);
      load_part(s + j, r - j, change);
      store_part(out + i * r + j, r - j, left * (o[i] * first + change));
    }
  }
}

inline float sum_of(const Floats& v) {
  float half[8];
  for (int e = 0; e < 8; ++e) half[e] = v[e] + v[e + 8];
  return ((half[0] + half[4]) + (half[2] + half[6])) + ((half[1] + half[5]) + (half[3] + half[7]));
}

template <class T>
void fold_backward_lanes(const T* u, const float* p, const float* start, const float* o, float* ds, float* d_o,
                         int64_t begin, int64_t end, int64_t r) {
  for (int64_t i = begin; i < end; ++i) {
    Floats along{};
    const float scale = 1.0f + o[i];
    for (int64_t j = 0; j < r; j += kLanes) {
      Floats left, right, first, total;
      load_part(u + i * r + j, r - j, left);
      load_part(p + i * r + j, r - j, right);
      const Floats both = left * right;
      if (d_o) {
        load_part(start + j, r - j, first);
        along += both * first;
      }
      if (ds) {
        load_part(ds + j, r - j, total);
        store_part(ds + j, r - j, total + scale * both);
      }
    }
    if (d_o) d_o[i] = sum_of(along);
  }
}

constexpr FoldKernels kFold{{fold_lanes<float>, fold_backward_lanes<float>},
                            {fold_lanes<uint16_t>, fold_backward_lanes<uint16_t>}};

}  // namespace
}  // namespace osora::cpu
