// SPDX-License-Identifier: Apache-2.0
// Runs the kernels of csrc/cuda/linear/decode.cu on the CPU against float64, over sizes, types and alignments, for one
// adapter and for several. The last line is a hash of all output bits: equal in every schedule (OSORA_EMULATION_ORDER).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "cuda/linear/decode.h"
#include "drive.h"

namespace {

using namespace osora::cuda;
using namespace osora::driver;

constexpr int64_t kAdapters = 3;

// How many numbers behind a 16-byte boundary the arrays start.
struct Skip {
  int x = 0, w = 0, v = 0, vectors = 0;
};
enum Rows { kOneAdapter, kSeveral, kRanks, kHostile };  // whose the rows are; kHostile: an index of no adapter as well

template <class T>
void run(int64_t n, int64_t d, int64_t k, int64_t r, Rows rows = kOneAdapter, Skip skip = {}, bool weight = true,
         bool with_bias = true) {
  using A = accumulate_t<T>;
  std::mt19937 random(static_cast<unsigned>(n + d * 31 + k * 7 + r * 3));
  Array<T> x(n * k, skip.x), w(d * k, skip.w), bias(d, skip.vectors), v(k * r, skip.v), u(d * r, skip.v);
  Array<T> h(n * r, skip.v), y(n * d, skip.x);
  const int64_t count = rows == kOneAdapter ? 1 : kAdapters;
  Array<A> s0(r, skip.vectors), s(count * r, skip.vectors), o(count * d, skip.vectors);
  x.fill(random, 1.0), w.fill(random, 0.1), bias.fill(random, 1.0), v.fill(random, 0.1), u.fill(random, 0.1);
  s0.fill(random, 1.0), s.fill(random, 0.1), o.fill(random, 0.1);
  const std::vector<int64_t> ranks = {r / 2, 0, r};
  std::vector<int64_t> index(n);
  for (int64_t i = 0; i < n; ++i) index[i] = rows == kOneAdapter ? 0 : (i + 1) % (kAdapters + 1) - 1;
  if (rows == kHostile) index[0] = kAdapters, index[n - 1] = INT64_MIN;
  for (int64_t a = 0; rows == kRanks && a < count; ++a) {  // beyond the rank anything may stand
    for (int64_t j = ranks[a]; j < r; ++j) s[a * r + j] = static_cast<A>(NAN);
  }

  decode_shrink(x.data(), v.data(), h.data(), n, k, r, nullptr);
  const DecodeAdapters<T> adapters{s0.data(),
                                   s.data(),
                                   o.data(),
                                   rows == kRanks ? ranks.data() : nullptr,
                                   rows == kOneAdapter ? nullptr : index.data(),
                                   count};
  decode_expand(x.data(), weight ? w.data() : nullptr, with_bias ? bias.data() : nullptr, h.data(), u.data(), adapters,
                y.data(), n, d, k, r, nullptr);

  // Sums in A: a rounding per addition, and they cancel like a random walk; 32 of them per unit of the summed sizes is
  // generous. Then one rounding to T. y starts from the rounded h.
  const double unit = std::is_same_v<A, double> ? 0x1p-53 : 0x1p-24;
  const auto allowed = [&](double wish, double size) {
    return Number<T>::kUnit * 1.01 * std::fabs(wish) + 32 * unit * size + Number<T>::kLeast;
  };
  Worst shrink_worst, expand_worst;
  int64_t not_nan = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < r; ++j) {
      double wish = 0, size = 0;
      for (int64_t c = 0; c < k; ++c) {
        const double term = x.at(i * k + c) * v.at(c * r + j);
        wish += term, size += std::fabs(term);
      }
      shrink_worst.add(h.at(i * r + j), wish, allowed(wish, size));
    }
    const int64_t a = index[i];
    for (int64_t q = 0; q < d; ++q) {
      double wish = with_bias ? bias.at(q) : 0, size = std::fabs(wish);
      for (int64_t c = 0; weight && c < k; ++c) {
        const double term = x.at(i * k + c) * w.at(q * k + c);
        wish += term, size += std::fabs(term);
      }
      if (a < -1 || a >= count) {
        not_nan += !std::isnan(y.at(i * d + q));
        continue;
      }
      const int64_t rank = a == -1 ? 0 : rows == kRanks ? ranks[a] : r;
      for (int64_t j = 0; j < rank; ++j) {
        const double start = s0.at(j) + s.at(a * r + j), scale = o.at(a * d + q),
                     hu = h.at(i * r + j) * u.at(q * r + j);
        wish += hu * (scale * start + s.at(a * r + j));
        size += std::fabs(hu) * (std::fabs(scale * start) + std::fabs(s.at(a * r + j)));
      }
      expand_worst.add(y.at(i * d + q), wish, allowed(wish, size));
    }
  }
  const uint64_t bits = y.hash(h.hash(1469598103934665603ull));
  all_bits = (all_bits ^ bits) * 1099511628211ull;
  std::printf("%-8s n=%ld d=%3ld k=%4ld r=%4ld %d skip=%d%d%d%d %s%s  error/allowed h %.2f y %.2f  %016lx\n",
              Number<T>::kName, static_cast<long>(n), static_cast<long>(d), static_cast<long>(k), static_cast<long>(r),
              rows, skip.x, skip.w, skip.v, skip.vectors, weight ? "w" : "-", with_bias ? "b" : "-", shrink_worst.ratio,
              expand_worst.ratio, static_cast<unsigned long>(bits));
  expect(shrink_worst.ratio <= 1, "h", shrink_worst.ratio, 1);
  expect(expand_worst.ratio <= 1, "y", expand_worst.ratio, 1);
  expect(not_nan == 0, "a row with a wrong index is NaN", static_cast<double>(not_nan), 0);
}

template <class T>
void run_sizes() {
  for (int64_t n = 1; n <= 8; ++n) run<T>(n, 9, 40, 16);
  run<T>(1, 1, 1, 1);
  run<T>(3, 13, 37, 7);     // no whole packs anywhere
  run<T>(2, 5, 64, 11);     // packs in W, none in V
  run<T>(5, 8, 33, 24);     // and the other way round
  run<T>(1, 17, 2100, 64);  // every thread has several packs, and several rows of V
  run<T>(8, 3, 1031, 9);
  run<T>(4, 6, 24, 1024);  // many columns of V; several columns of U per thread
  run<T>(8, 5, 16, 257);
  for (const Rows rows : {kSeveral, kRanks, kHostile}) {
    run<T>(8, 10, 48, 20, rows);
    run<T>(4, 6, 17, 9, rows);
    run<T>(1, 3, 24, 8, rows);
  }
  run<T>(4, 9, 64, 16, kOneAdapter, {1, 0, 0, 0});
  run<T>(4, 9, 64, 16, kOneAdapter, {0, 1, 0, 0});
  run<T>(4, 9, 64, 16, kOneAdapter, {0, 0, 1, 0});
  run<T>(4, 9, 64, 16, kOneAdapter, {0, 0, 0, 1});
  run<T>(1, 9, 64, 16, kSeveral, {1, 1, 1, 1});
  run<T>(3, 9, 64, 16, kOneAdapter, {}, false, false);
  run<T>(3, 9, 64, 16, kOneAdapter, {}, true, false);
  run<T>(3, 9, 64, 0);
  run<T>(3, 9, 0, 8);
  run<T>(3, 0, 64, 8);
}

}  // namespace

int main() {
  run_sizes<double>();
  run_sizes<float>();
  run_sizes<__nv_bfloat16>();
  run_sizes<__half>();
  std::printf("%d failures\nbits %016lx\n", failures, static_cast<unsigned long>(all_bits));
  return failures != 0;
}
