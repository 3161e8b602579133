// SPDX-License-Identifier: Apache-2.0
// The part of CUDA C++ that our kernels use, for g++ and clang++: a GPU on one CPU core.
//
// include/cuda_runtime.h stands before the real one and brings this file in; a .cu file then compiles as plain C++.
// Not modelled: weak memory (but TSan sees what lacks a barrier), timing, TMA and other asynchronous copies, clusters.
// Static __shared__ arrays, atomics and fences are left out on purpose: our kernels do without.
#pragma once
#define OSORA_EMULATED 1

#include <cmath>
#include <cstdint>
#include <cstring>

#include "grid.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (osora::emulation::thread_index())
#define blockIdx (osora::emulation::block_index())
#define blockDim (osora::emulation::block_shape())
#define gridDim (osora::emulation::grid_shape())

using cudaStream_t = struct CUstream_st*;

inline void __syncthreads(osora::emulation::Site site = osora::emulation::Site::current()) {
  osora::emulation::block_barrier(site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, osora::emulation::Site site = osora::emulation::Site::current()) {
  osora::emulation::warp_barrier(mask, /*orders_memory=*/true, site);
}
inline unsigned __ballot_sync(unsigned mask, int value,
                              osora::emulation::Site site = osora::emulation::Site::current()) {
  return osora::emulation::ballot(mask, value != 0, site);
}

namespace osora::emulation {

// A warp is cut into segments of `width` lanes (a power of two); a source outside the own segment means "keep mine".
template <class T>
T shuffle(unsigned mask, T value, int source, int width, const Site& site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles 4 or 8 bytes");
  const int lane = lane_id(), segment = lane & ~(width - 1);
  if (source < segment || source >= segment + width) source = lane;
  uint64_t raw = 0;
  __builtin_memcpy(&raw, &value, sizeof(T));
  raw = exchange(mask, raw, static_cast<unsigned>(source), site);
  __builtin_memcpy(&value, &raw, sizeof(T));
  return value;
}

}  // namespace osora::emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              osora::emulation::Site site = osora::emulation::Site::current()) {
  const int segment = osora::emulation::lane_id() & ~(width - 1);
  return osora::emulation::shuffle(mask, value, segment + (source & (width - 1)), width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  osora::emulation::Site site = osora::emulation::Site::current()) {
  return osora::emulation::shuffle(mask, value, osora::emulation::lane_id() ^ bits, width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   osora::emulation::Site site = osora::emulation::Site::current()) {
  return osora::emulation::shuffle(mask, value, osora::emulation::lane_id() + static_cast<int>(delta), width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 osora::emulation::Site site = osora::emulation::Site::current()) {
  return osora::emulation::shuffle(mask, value, osora::emulation::lane_id() - static_cast<int>(delta), width, site);
}

// The twin of csrc/cuda/common/launch.h.
namespace osora::cuda {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            Arguments... arguments) {
  const auto call = [=] { kernel(static_cast<Parameters>(arguments)...); };
  using Call = decltype(call);
  emulation::Body body{[](const void* context) { (*static_cast<const Call*>(context))(); }, &call};
  emulation::run_grid(grid, block, shared_bytes, body);
}

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulation::shared_memory());
}

}  // namespace osora::cuda
