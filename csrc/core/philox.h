// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10, a counter-based random generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011). A number depends only on (seed, key, stream, index): never on the position of a matrix in a batch, on the
// number of threads or on what else was drawn.
#pragma once
#include <array>
#include <cmath>
#include <cstdint>

namespace osora::core {

inline std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * counter[2];
    counter = {uint32_t(b >> 32) ^ counter[1] ^ key[0], uint32_t(b), uint32_t(a >> 32) ^ counter[3] ^ key[1],
               uint32_t(a)};
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return counter;
}

// 64 bits to 64 bits; the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014). Mixes a seed with a key.
inline uint64_t mix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// Fills out[count] with standard normal numbers (Box-Muller, in double, two per counter).
template <class T>
void fill_gaussian(T* out, int64_t count, uint64_t seed, uint64_t key, uint32_t stream) {
  const uint64_t mixed = mix64(seed ^ mix64(key));
  for (int64_t i = 0; i < count; i += 2) {
    const auto bits =
        philox4x32({uint32_t(i / 2), uint32_t((i / 2) >> 32), stream, 0}, {uint32_t(mixed), uint32_t(mixed >> 32)});
    const uint64_t a = (uint64_t{bits[0]} << 32 | bits[1]) >> 11, b = (uint64_t{bits[2]} << 32 | bits[3]) >> 11;
    const double u = (double(a) + 0.5) * 0x1p-53, angle = double(b) * 0x1p-53 * 2.0 * M_PI;  // 0 < u < 1
    const double radius = std::sqrt(-2.0 * std::log(u));
    out[i] = static_cast<T>(radius * std::cos(angle));
    if (i + 1 < count) out[i + 1] = static_cast<T>(radius * std::sin(angle));
  }
}

}  // namespace osora::core
