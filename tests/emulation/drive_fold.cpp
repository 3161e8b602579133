// SPDX-License-Identifier: Apache-2.0
// Runs the kernels of csrc/cuda/fold/fold.cu and fold_many.cu on the CPU against a float64 reference, over many sizes,
// types and alignments. The last line is a hash of all output bits: equal in every schedule (OSORA_EMULATION_ORDER).
#include <cmath>
#include <cstdio>
#include <limits>
#include <list>
#include <random>
#include <vector>

#include "cuda/common/half.cuh"
#include "cuda/fold/fold.h"
#include "cuda/fold/fold_many.h"
#include "drive.h"

namespace {

using namespace osora::cuda;
using namespace osora::driver;

// How many numbers behind a 16-byte boundary the arrays start.
struct Skip {
  int u = 0, p = 0, vectors = 0;
};

template <class T>
void run(int64_t d, int64_t r, Skip skip, bool need_s = true, bool need_o = true) {
  using A = accumulate_t<T>;
  std::mt19937 random(static_cast<unsigned>(d * 31 + r * 7));
  Array<T> u(d * r, skip.u), d_out(d * r, skip.u);
  Array<A> p(d * r, skip.p), partial(fold_backward_blocks(d) * r, skip.p);
  Array<A> s0(r, skip.vectors), s(r, skip.vectors), o(d, skip.vectors), ds(r, skip.vectors), d_o(d, skip.vectors);
  u.fill(random, 1.0), p.fill(random, 1.0), s.fill(random, 0.01), o.fill(random, 0.01);
  for (int64_t j = 0; j < r; ++j) s0[j] = static_cast<A>(3.0 / (1 + j));

  fold(u.data(), s0.data(), s.data(), o.data(), d_out.data(), d, r, nullptr);
  fold_backward(u.data(), p.data(), s0.data(), s.data(), o.data(), need_s ? ds.data() : nullptr,
                need_o ? d_o.data() : nullptr, need_s ? partial.data() : nullptr, d, r, nullptr);

  // D: one rounding to T, after a few in A. Sums: a rounding in A per addition; both orders of ours add at most
  // kRows + blocks / 8 terms in a row, but roundings cancel: 32 of them is generous.
  const double unit = std::is_same_v<A, double> ? 0x1p-53 : 0x1p-24;
  Worst fold_worst, ds_worst, do_worst;
  std::vector<double> ds_wish(r), ds_size(r);
  for (int64_t i = 0; i < d; ++i) {
    double wish = 0, size = 0;
    for (int64_t j = 0; j < r; ++j) {
      const double x = u.at(i * r + j), start = s0.at(j) + s.at(j), product = x * p.at(i * r + j);
      const double value = x * (o.at(i) * start + s.at(j));
      const double rounding = std::fabs(x) * (std::fabs(o.at(i) * start) + std::fabs(s.at(j)));
      fold_worst.add(d_out.at(i * r + j), value,
                     Number<T>::kUnit * 1.01 * std::fabs(value) + 4 * unit * rounding + Number<T>::kLeast);
      wish += product * start, size += std::fabs(product * start);
      ds_wish[j] += (1 + o.at(i)) * product, ds_size[j] += std::fabs((1 + o.at(i)) * product);
    }
    if (need_o) do_worst.add(d_o.at(i), wish, 32 * unit * size);
  }
  for (int64_t j = 0; need_s && j < r; ++j) ds_worst.add(ds.at(j), ds_wish[j], 32 * unit * ds_size[j]);

  uint64_t bits = d_out.hash(1469598103934665603ull);
  if (need_s) bits = ds.hash(bits);
  if (need_o) bits = d_o.hash(bits);
  all_bits = (all_bits ^ bits) * 1099511628211ull;
  std::printf("%-8s d=%4ld r=%4ld skip=%d%d%d %s%s  error/allowed D %.2f ds %.2f do %.2f  %016lx\n", Number<T>::kName,
              static_cast<long>(d), static_cast<long>(r), skip.u, skip.p, skip.vectors, need_s ? "s" : "-",
              need_o ? "o" : "-", fold_worst.ratio, ds_worst.ratio, do_worst.ratio, static_cast<unsigned long>(bits));
  expect(fold_worst.ratio <= 1, "fold", fold_worst.ratio, 1);
  expect(ds_worst.ratio <= 1, "ds", ds_worst.ratio, 1);
  expect(do_worst.ratio <= 1, "do", do_worst.ratio, 1);
}

// Layers of many shapes at once, empty and unaligned ones among them: fold()'s own bits.
template <class T>
void run_many(int layers) {
  using A = accumulate_t<T>;
  std::mt19937 random(static_cast<unsigned>(layers));
  std::list<Array<T>> matrices;
  std::list<Array<A>> vectors;
  std::vector<FoldLayer<T>> table;
  std::vector<Array<T>*> results, wishes;
  const auto vector = [&](int64_t count, double scale) {
    vectors.emplace_back(count, static_cast<int>(random() % 2));
    vectors.back().fill(random, scale);
    return vectors.back().data();
  };
  for (int k = 0; k < layers; ++k) {
    const int64_t d = k % 7 == 3 ? 0 : 1 + k * 37 % 150, r = k % 11 == 5 ? 0 : k % 3 ? 8 * (1 + k % 5) : 1 + k % 70;
    for (const int skip : {k % 4 == 3, k % 5 == 4, k % 5 == 4}) matrices.emplace_back(d * r, skip);  // u, two results
    auto last = matrices.rbegin();
    results.push_back(&*last++), wishes.push_back(&*last++);
    last->fill(random, 1.0);
    table.push_back({last->data(), vector(r, 1.0), vector(r, 0.01), vector(d, 0.01), results.back()->data(), d, r});
  }
  fold_many(table.data(), layers, nullptr);
  int64_t wrong = 0;
  uint64_t bits = 1469598103934665603ull;
  for (int k = 0; k < layers; ++k) {
    const auto& [u, s0, s, o, d_out, d, r] = table[k];
    fold(u, s0, s, o, wishes[k]->data(), d, r, nullptr);
    wrong += results[k]->hash(0) != wishes[k]->hash(0);
    bits = results[k]->hash(bits);
  }
  all_bits = (all_bits ^ bits) * 1099511628211ull;
  std::printf("%-8s %d layers: %ld differ  %016lx\n", Number<T>::kName, layers, static_cast<long>(wrong),
              static_cast<unsigned long>(bits));
  failures += static_cast<int>(wrong);
}

template <class T>
void run_sizes() {
  run_many<T>(0);
  run_many<T>(15);
  for (const int64_t r : {1, 7, 8, 64, 100}) run<T>(65, r, {});
  run<T>(131, 257, {});  // several column tiles of single numbers
  run<T>(67, 1024, {});  // several column tiles of packs
  run<T>(300, 16, {});   // several blocks
  run<T>(130, 64, {1, 1, 1});
  run<T>(33, 64, {1, 0, 0});
  run<T>(33, 64, {0, 1, 0});
  run<T>(33, 64, {0, 0, 1});
  run<T>(33, 64, {}, true, false);
  run<T>(33, 64, {}, false, true);
  run<T>(0, 8, {});
  run<T>(5, 0, {});
}

// All 2^16 values survive the way to float and back; the float halfway between two neighbours goes to the even one,
// and the next floats on either side go to the near one. That is round-to-nearest-even, everywhere.
template <class T, class Narrow>
void check_rounding(const char* name, uint16_t infinity, Narrow narrow_to) {
  int bad = 0;
  for (unsigned bits = 0; bits < infinity; ++bits) {
    for (const unsigned sign : {0u, 0x8000u}) {
      const T low{static_cast<uint16_t>(bits | sign)}, high{static_cast<uint16_t>(bits + 1)};
      const float value = widen(low);
      bad += narrow_to(value).bits != low.bits;
      if (sign) continue;
      // Above the largest number the next one would be 2^(e+1); the same halfway rule makes it infinite.
      const double above = bits + 1 == infinity ? 2.0 * value - widen(T{static_cast<uint16_t>(bits - 1)}) : widen(high);
      const float half = static_cast<float>((static_cast<double>(value) + above) / 2);
      const uint16_t even = bits & 1 ? high.bits : low.bits;
      bad += narrow_to(half).bits != even || narrow_to(-half).bits != (even | 0x8000u);
      bad += narrow_to(std::nextafter(half, 0.0f)).bits != low.bits;
      bad += narrow_to(std::nextafter(half, INFINITY)).bits != high.bits;
    }
  }
  const float nan = std::numeric_limits<float>::quiet_NaN();
  bad += narrow_to(nan).bits != 0x7fff || !std::isnan(widen(narrow_to(nan)));
  bad += narrow_to(INFINITY).bits != infinity || narrow_to(-INFINITY).bits != (infinity | 0x8000u);
  bad += !std::isinf(widen(T{infinity})) || !std::isnan(widen(T{static_cast<uint16_t>(infinity + 1)}));
  std::printf("%-8s rounding: %d wrong\n", name, bad);
  failures += bad;
}

}  // namespace

int main() {
  check_rounding<__nv_bfloat16>("bfloat16", 0x7f80, [](float x) { return __float2bfloat16_rn(x); });
  check_rounding<__half>("float16", 0x7c00, [](float x) { return __float2half_rn(x); });
  run_sizes<double>();
  run_sizes<float>();
  run_sizes<__nv_bfloat16>();
  run_sizes<__half>();
  std::printf("%d failures\nbits %016lx\n", failures, static_cast<unsigned long>(all_bits));
  return failures != 0;
}
