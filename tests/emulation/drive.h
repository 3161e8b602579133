// SPDX-License-Identifier: Apache-2.0
// What the programs drive_*.cpp share: number types, arrays of exact size, and a count of failures.
//
// Every array is a heap block of its exact size, so that ASan sees any access beside it; what nobody has filled is NaN.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>

#include "core/accumulate.h"
#include "cuda/common/half.cuh"

namespace osora::driver {

using core::accumulate_t;

template <class T>
struct Number;
template <>
struct Number<double> {
  static constexpr const char* kName = "float64";
  static constexpr double kUnit = 0x1p-53, kLeast = 0;  // half a unit in the last place; half of the least subnormal
};
template <>
struct Number<float> {
  static constexpr const char* kName = "float32";
  static constexpr double kUnit = 0x1p-24, kLeast = 0x1p-150;
};
template <>
struct Number<__nv_bfloat16> {
  static constexpr const char* kName = "bfloat16";
  static constexpr double kUnit = 0x1p-8, kLeast = 0x1p-134;
};
template <>
struct Number<__half> {
  static constexpr const char* kName = "float16";
  static constexpr double kUnit = 0x1p-11, kLeast = 0x1p-25;
};

template <class T>
T from_double(double x) {
  T y;
  cuda::narrow(static_cast<accumulate_t<T>>(x), y);
  return y;
}

// `count` numbers, `skip` numbers behind a 16-byte boundary; full of NaN.
template <class T>
class Array {
 public:
  Array(int64_t count, int skip) : count_(count), skip_(skip), memory_(new T[count + skip]) {
    std::memset(static_cast<void*>(memory_.get()), 0xFF, (count + skip) * sizeof(T));
  }
  T* data() { return memory_.get() + skip_; }
  T& operator[](int64_t k) { return memory_[k + skip_]; }
  double at(int64_t k) { return static_cast<double>(cuda::widen((*this)[k])); }
  void fill(std::mt19937& random, double scale) {
    std::normal_distribution<double> normal;
    for (int64_t k = 0; k < count_; ++k) (*this)[k] = from_double<T>(scale * normal(random));
  }
  uint64_t hash(uint64_t h) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(data());
    for (size_t k = 0; k < count_ * sizeof(T); ++k) h = (h ^ bytes[k]) * 1099511628211ull;
    return h;
  }

 private:
  int64_t count_;
  int skip_;
  std::unique_ptr<T[]> memory_;
};

inline int failures = 0;
inline uint64_t all_bits = 1469598103934665603ull;

inline void expect(bool good, const char* what, double error, double bound) {
  if (good) return;
  ++failures;
  std::printf("  FAILED: %s: error %g, allowed %g\n", what, error, bound);
}

// The worst ratio error / allowed, NaN counting as infinite.
struct Worst {
  double ratio = 0;
  void add(double got, double wish, double allowed) {
    const double error = std::fabs(got - wish);
    if (!(error <= allowed))
      ratio = std::isnan(error) || allowed == 0 ? INFINITY : std::max(ratio, error / allowed);
    else if (allowed > 0)
      ratio = std::max(ratio, error / allowed);
  }
};

}  // namespace osora::driver
