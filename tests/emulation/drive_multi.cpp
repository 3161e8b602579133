// SPDX-License-Identifier: Apache-2.0
// Runs the kernels of csrc/cuda/linear/multi.cu on the CPU against float64, over sizes, types and alignments, with rows
// of the base, adapters of smaller rank, and indices that no adapter has. The last line is a hash of all output bits:
// equal in every schedule (OSORA_EMULATION_ORDER).
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "cuda/linear/multi.h"
#include "drive.h"

namespace {

using namespace osora::cuda;
using namespace osora::driver;

constexpr int64_t kAdapters = 3;

// index[i]: the adapters, the base, and now and then one too large, one too small, one that overflows any product.
std::vector<int64_t> make_index(int64_t n, bool hostile) {
  std::vector<int64_t> index(n);
  for (int64_t i = 0; i < n; ++i) index[i] = (i * 7 + 1) % (kAdapters + 1) - 1;
  const int64_t wrong[] = {kAdapters, -2, INT64_MAX, INT64_MIN};
  for (int64_t i = 0, w = 0; hostile && i < n; i += 5, ++w) index[i] = wrong[w % 4];
  return index;
}
bool is_wrong(int64_t a) { return a < -1 || a >= kAdapters; }

// Counts the numbers of a row that are not NaN, as a failure each.
template <class T>
void expect_nan(Array<T>& array, int64_t first, int64_t count) {
  int64_t numbers = 0;
  for (int64_t k = 0; k < count; ++k) numbers += !std::isnan(array.at(first + k));
  expect(numbers == 0, "a row with a wrong index is NaN", static_cast<double>(numbers), 0);
}

template <class T>
void report(const char* what, int64_t n, int64_t columns, int skip, int skip_vectors, double ratio, uint64_t bits) {
  all_bits = (all_bits ^ bits) * 1099511628211ull;
  std::printf("%-7s %-8s n=%3ld columns=%4ld skip=%d%d  error/allowed %.2f  %016lx\n", what, Number<T>::kName,
              static_cast<long>(n), static_cast<long>(columns), skip, skip_vectors, ratio,
              static_cast<unsigned long>(bits));
  expect(ratio <= 1, what, ratio, 1);
}

template <class T>
void run_scale(int64_t n, int64_t r, bool with_ranks, int skip = 0, int skip_vectors = 0, bool hostile = false) {
  using A = accumulate_t<T>;
  std::mt19937 random(static_cast<unsigned>(n * 31 + r * 7));
  Array<T> h(n * r, skip), t(2 * n * r, skip);
  Array<A> s0(r, skip_vectors), s(kAdapters * r, skip_vectors);
  h.fill(random, 1.0), s0.fill(random, 1.0), s.fill(random, 0.1);
  std::vector<int64_t> ranks = {r, r / 2, 0};
  for (int64_t a = 0; with_ranks && a < kAdapters; ++a) {  // beyond the rank anything may stand
    for (int64_t j = ranks[a]; j < r; ++j) s[a * r + j] = static_cast<A>(NAN);
  }
  const auto index = make_index(n, hostile);
  multi_scale(h.data(), s0.data(), s.data(), with_ranks ? ranks.data() : nullptr, index.data(), t.data(), n, r,
              kAdapters, nullptr);

  // One rounding to T, after two in A (s0 + s, and the product).
  const double unit = std::is_same_v<A, double> ? 0x1p-53 : 0x1p-24;
  Worst worst;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t a = index[i];
    if (is_wrong(a)) {
      expect_nan(t, i * r, r), expect_nan(t, (n + i) * r, r);
      continue;
    }
    const int64_t rank = a == -1 ? 0 : with_ranks ? ranks[a] : r;
    for (int64_t j = 0; j < r; ++j) {
      const double x = j < rank ? h.at(i * r + j) : 0, start = s0.at(j), shift = j < rank ? s.at(a * r + j) : 0;
      const double size = std::fabs(x) * (std::fabs(start) + std::fabs(shift));
      const auto allowed = [&](double wish) {
        return Number<T>::kUnit * 1.01 * std::fabs(wish) + 2 * unit * size + (size > 0 ? Number<T>::kLeast : 0);
      };
      worst.add(t.at(i * r + j), x * (start + shift), allowed(x * (start + shift)));
      worst.add(t.at((n + i) * r + j), x * shift, allowed(x * shift));
    }
  }
  report<T>("scale", n, r, skip, skip_vectors, worst.ratio, t.hash(1469598103934665603ull));
}

template <class T>
void run_combine(int64_t n, int64_t d, int skip = 0, int skip_vectors = 0, bool hostile = false) {
  using A = accumulate_t<T>;
  std::mt19937 random(static_cast<unsigned>(n * 17 + d * 3));
  Array<T> y(n * d, skip), before(n * d, skip), t(2 * n * d, skip);
  Array<A> o(kAdapters * d, skip_vectors);
  y.fill(random, 1.0), t.fill(random, 1.0), o.fill(random, 0.1);
  const auto index = make_index(n, hostile);
  std::memcpy(static_cast<void*>(before.data()), y.data(), n * d * sizeof(T));
  multi_combine(y.data(), t.data(), o.data(), index.data(), n, d, kAdapters, nullptr);

  // One rounding to T, after two in A (the fused product, and the sum with y).
  const double unit = std::is_same_v<A, double> ? 0x1p-53 : 0x1p-24;
  Worst worst;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t a = index[i];
    if (a == -1) {
      const bool same = std::memcmp(&y[i * d], &before[i * d], d * sizeof(T)) == 0;
      expect(same, "a row of the base keeps its bits", 1, 0);
      continue;
    }
    if (is_wrong(a)) {
      expect_nan(y, i * d, d);
      continue;
    }
    for (int64_t j = 0; j < d; ++j) {
      const double both = t.at(i * d + j), change = t.at((n + i) * d + j), scale = o.at(a * d + j);
      const double wish = before.at(i * d + j) + scale * both + change;
      const double size = std::fabs(before.at(i * d + j)) + std::fabs(scale * both) + std::fabs(change);
      worst.add(y.at(i * d + j), wish, Number<T>::kUnit * 1.01 * std::fabs(wish) + 2 * unit * size + Number<T>::kLeast);
    }
  }
  report<T>("combine", n, d, skip, skip_vectors, worst.ratio, y.hash(1469598103934665603ull));
}

template <class T>
void run_sizes() {
  for (const bool with_ranks : {false, true}) {
    for (const int64_t r : {1, 7, 8, 64, 100}) run_scale<T>(13, r, with_ranks);
    run_scale<T>(5, 257, with_ranks);   // several column tiles of single numbers
    run_scale<T>(7, 1024, with_ranks);  // several column tiles of packs
    run_scale<T>(70, 16, with_ranks);   // several blocks
    run_scale<T>(9, 64, with_ranks, 1, 1);
    run_scale<T>(9, 64, with_ranks, 1, 0);
    run_scale<T>(9, 64, with_ranks, 0, 1);
    run_scale<T>(21, 40, with_ranks, 0, 0, true);
  }
  for (const int64_t d : {1, 7, 8, 64, 100}) run_combine<T>(13, d);
  run_combine<T>(5, 257);
  run_combine<T>(7, 1024);
  run_combine<T>(70, 16);
  run_combine<T>(9, 64, 1, 1);
  run_combine<T>(9, 64, 1, 0);
  run_combine<T>(9, 64, 0, 1);
  run_combine<T>(21, 40, 0, 0, true);
  for (const auto& [rows, columns] : {std::pair<int64_t, int64_t>{0, 8}, {5, 0}}) {
    run_scale<T>(rows, columns, true);
    run_combine<T>(rows, columns);
  }
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
