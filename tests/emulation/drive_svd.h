// SPDX-License-Identifier: Apache-2.0
// What the parts of the program drive_svd.cpp share: matrices in blocks of exact size, and a count of failures.
//
// Every array is a heap block of its exact size, so that ASan sees any access beside it; outputs and scratch start as
// NaN.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>

#include "cuda/common/half.cuh"
#include "cuda/svd/svd_kernels.h"

namespace osora::driver {

using namespace osora::cuda;

inline int failures = 0, checks = 0;
inline uint64_t all_bits = 1469598103934665603ull;
inline std::mt19937 generator;

inline void expect(bool good, const char* what) {
  ++checks;
  if (good) return;
  ++failures;
  std::printf("  FAILED: %s\n", what);
}
inline bool near(double got, double wish, double error) { return std::fabs(got - wish) <= error; }

// Matrices in one block of exact size, with `gap` numbers between them.
class Array {
 public:
  Array(Type type, int64_t rows, int64_t cols, int64_t batch = 1, int64_t gap = 0)
      : matrices_{nullptr, type, rows, cols, batch, rows * cols + gap},
        count_(batch ? (batch - 1) * matrices_.stride + rows * cols : 0),
        memory_(new unsigned char[count_ * size_of(type)]) {
    matrices_.data = memory_.get();
    std::memset(memory_.get(), 0xFF, count_ * size_of(type));
  }
  const Matrices& matrices() const { return matrices_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(matrices_.data);
  }
  int* ints() const { return as<int>(); }
  double* doubles() const { return as<double>(); }
  double get(int64_t b, int64_t i, int64_t j) const {
    const void* at = matrices_.at(b, j);
    switch (matrices_.type) {
      case Type::kFloat64:
        return static_cast<const double*>(at)[i];
      case Type::kFloat32:
        return static_cast<double>(static_cast<const float*>(at)[i]);
      case Type::kBFloat16:
        return static_cast<double>(widen(static_cast<const __nv_bfloat16*>(at)[i]));
      case Type::kFloat16:
        return static_cast<double>(widen(static_cast<const __half*>(at)[i]));
      case Type::kInt32:
        return static_cast<const int*>(at)[i];
      default:
        return static_cast<double>(static_cast<const int64_t*>(at)[i]);
    }
  }
  void set(int64_t b, int64_t i, int64_t j, double x) const {
    void* const at = matrices_.at(b, j);
    switch (matrices_.type) {
      case Type::kFloat64:
        static_cast<double*>(at)[i] = x;
        return;
      case Type::kFloat32:
        static_cast<float*>(at)[i] = static_cast<float>(x);
        return;
      case Type::kBFloat16:
        narrow(static_cast<float>(x), static_cast<__nv_bfloat16*>(at)[i]);
        return;
      case Type::kFloat16:
        narrow(static_cast<float>(x), static_cast<__half*>(at)[i]);
        return;
      case Type::kInt32:
        static_cast<int*>(at)[i] = static_cast<int>(x);
        return;
      default:
        static_cast<int64_t*>(at)[i] = static_cast<int64_t>(x);
    }
  }
  // Every number by its place.
  const Array& fill(const std::function<double(int64_t, int64_t, int64_t)>& value) const {
    each([&](int64_t b, int64_t i, int64_t j) { set(b, i, j, value(b, i, j)); });
    return *this;
  }
  const Array& normal(double scale = 1) const {
    std::normal_distribution<double> draw;
    return fill([&](int64_t, int64_t, int64_t) { return scale * draw(generator); });
  }
  bool all(const std::function<bool(int64_t, int64_t, int64_t)>& good) const {
    bool right = true;
    each([&](int64_t b, int64_t i, int64_t j) { right = right && good(b, i, j); });
    return right;
  }
  double norm(int64_t b, int64_t j) const {
    double sum = 0;
    for (int64_t i = 0; i < matrices_.rows; ++i) sum += get(b, i, j) * get(b, i, j);
    return std::sqrt(sum);
  }
  // Into the hash of everything.
  const Array& count() const {
    for (int64_t k = 0; k < count_ * size_of(matrices_.type); ++k)
      all_bits = (all_bits ^ memory_[k]) * 1099511628211ull;
    return *this;
  }

 private:
  template <class Call>
  void each(Call call) const {
    for (int64_t b = 0; b < matrices_.batch; ++b)
      for (int64_t j = 0; j < matrices_.cols; ++j)
        for (int64_t i = 0; i < matrices_.rows; ++i) call(b, i, j);
  }
  Matrices matrices_;
  int64_t count_;
  std::unique_ptr<unsigned char[]> memory_;
};

inline Array vector_of(Type type, int64_t count, int64_t batch = 1) { return {type, 1, count, batch}; }

constexpr Type kWork[] = {Type::kFloat64, Type::kFloat32};

void orthogonal();  // the part in drive_svd_orthogonal.cpp

}  // namespace osora::driver
