// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10, a counter-based random generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011). A number depends only on (seed, key, stream, index): never on the position of a matrix in a batch, on the
// number of threads or on what else was drawn. The same code runs on the host and in the kernels of csrc/cuda.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define OSORA_HOST_DEVICE __host__ __device__
#else
#define OSORA_HOST_DEVICE
#endif

namespace osora::core {

struct PhiloxCounter {
  uint32_t at[4];
};

OSORA_HOST_DEVICE inline PhiloxCounter philox4x32(PhiloxCounter counter, uint64_t key) {
  uint32_t low = uint32_t(key), high = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter.at[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * counter.at[2];
    counter = {
        {uint32_t(b >> 32) ^ counter.at[1] ^ low, uint32_t(b), uint32_t(a >> 32) ^ counter.at[3] ^ high, uint32_t(a)}};
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
  return counter;
}

// 64 bits to 64 bits; the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
inline uint64_t mix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// A seed and a key in one number.
inline uint64_t mixed_key(uint64_t seed, uint64_t key) { return mix64(seed ^ mix64(key)); }

struct NormalPair {
  double at[2];
};

// The standard normal numbers 2 pair and 2 pair + 1 of a stream (Box-Muller, in double, two per counter).
OSORA_HOST_DEVICE inline NormalPair normal_pair(uint64_t pair, uint64_t mixed, uint32_t stream) {
  const PhiloxCounter bits = philox4x32({{uint32_t(pair), uint32_t(pair >> 32), stream, 0}}, mixed);
  const uint64_t a = (uint64_t{bits.at[0]} << 32 | bits.at[1]) >> 11,
                 b = (uint64_t{bits.at[2]} << 32 | bits.at[3]) >> 11;
  const double u = (double(a) + 0.5) * 0x1p-53, half_turns = double(b) * 0x1p-52;  // 0 < u < 1
  const double radius = sqrt(-2.0 * log(u));
#ifdef __CUDA_ARCH__
  // The sine of an angle that may be of any size would need local memory.
  return {{radius * cospi(half_turns), radius * sinpi(half_turns)}};
#else
  const double angle = half_turns * M_PI;
  return {{radius * std::cos(angle), radius * std::sin(angle)}};
#endif
}

// Fills out[count] with standard normal numbers.
template <class T>
void fill_gaussian(T* out, int64_t count, uint64_t seed, uint64_t key, uint32_t stream) {
  const uint64_t mixed = mixed_key(seed, key);
  for (int64_t i = 0; i < count; i += 2) {
    const NormalPair pair = normal_pair(uint64_t(i / 2), mixed, stream);
    out[i] = static_cast<T>(pair.at[0]);
    if (i + 1 < count) out[i + 1] = static_cast<T>(pair.at[1]);
  }
}

}  // namespace osora::core
