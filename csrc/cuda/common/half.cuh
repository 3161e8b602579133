// SPDX-License-Identifier: Apache-2.0
// 16-bit numbers, and moves of whole 16-byte packs of numbers.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace osora::cuda {

// Every sum and product is computed in the accumulation type; narrow() is the one rounding at the end.
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

__device__ __forceinline__ void narrow(double x, double& y) { y = x; }
__device__ __forceinline__ void narrow(float x, float& y) { y = x; }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, __half& y) { y = __float2half_rn(x); }

// x y + z, rounded once. Written out: the bits must not depend on what a compiler contracts.
__device__ __forceinline__ double multiply_add(double x, double y, double z) { return fma(x, y, z); }
__device__ __forceinline__ float multiply_add(float x, float y, float z) { return fmaf(x, y, z); }

// N numbers moved by one instruction of up to 16 bytes; the address must be a multiple of sizeof(Pack).
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T at[N];
};

// How many T fill 16 bytes, the widest move of every architecture we compile for.
template <class T>
constexpr int kPerPack = 16 / sizeof(T);

// N consecutive numbers from memory to registers, widened to A. N is 1 (no demand on alignment), or a multiple of a
// pack (`from` must be 16-byte aligned).
template <int N, class T, class A>
__device__ __forceinline__ void load(const T* __restrict__ from, A (&to)[N]) {
  constexpr int kWidth = N < kPerPack<T> ? N : kPerPack<T>;
  static_assert(N == 1 || kWidth == kPerPack<T>);
#pragma unroll
  for (int first = 0; first < N; first += kWidth) {
    const auto pack = *reinterpret_cast<const Pack<T, kWidth>*>(from + first);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) to[first + e] = widen(pack.at[e]);
  }
}

// The way back, rounding each number once.
template <int N, class T, class A>
__device__ __forceinline__ void store(const A (&from)[N], T* __restrict__ to) {
  constexpr int kWidth = N < kPerPack<T> ? N : kPerPack<T>;
  static_assert(N == 1 || kWidth == kPerPack<T>);
#pragma unroll
  for (int first = 0; first < N; first += kWidth) {
    Pack<T, kWidth> pack;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) narrow(from[first + e], pack.at[e]);
    *reinterpret_cast<Pack<T, kWidth>*>(to + first) = pack;
  }
}

}  // namespace osora::cuda
