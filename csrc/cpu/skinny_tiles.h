// SPDX-License-Identifier: Apache-2.0
// The loops of skinny.h over a vector type. Included once in each translation unit, which is compiled for one
// instruction set: everything here is local to it, and no library header with inline code is included.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "cpu/skinny.h"

namespace osora::cpu {
namespace {

struct Eight {
  using type = __m256;
  static constexpr int kLanes = 8;
  static type load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, type v) { _mm256_storeu_ps(p, v); }
  static type spread(float x) { return _mm256_set1_ps(x); }
  static type multiply(type a, type b) { return _mm256_mul_ps(a, b); }
  static type multiply_add(type a, type b, type c) { return _mm256_fmadd_ps(a, b, c); }
  // For scan(): float32 numbers of which as many in float64 fill a register.
  using half = __m128;
  using wide = __m256d;
  static constexpr int kWide = 4;
  static half no_half() { return _mm_setzero_ps(); }
  static wide no_sum() { return _mm256_setzero_pd(); }
  static half load_half(const float* p) { return _mm_loadu_ps(p); }
  static void store_half(float* p, half v) { _mm_storeu_ps(p, v); }
  static void store_wide(double* p, wide v) { _mm256_storeu_pd(p, v); }
  static half magnitude(half v) { return _mm_andnot_ps(_mm_set1_ps(-0.0f), v); }
  static half larger(half a, half b) { return _mm_max_ps(a, b); }
  static wide widen(half v) { return _mm256_cvtps_pd(v); }
  static wide add_square(wide v, wide sum) { return _mm256_fmadd_pd(v, v, sum); }
};

#ifdef __AVX512F__
struct Sixteen {
  using type = __m512;
  static constexpr int kLanes = 16;
  static type load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, type v) { _mm512_storeu_ps(p, v); }
  static type spread(float x) { return _mm512_set1_ps(x); }
  static type multiply(type a, type b) { return _mm512_mul_ps(a, b); }
  static type multiply_add(type a, type b, type c) { return _mm512_fmadd_ps(a, b, c); }
  using half = __m256;
  using wide = __m512d;
  static constexpr int kWide = 8;
  static half no_half() { return _mm256_setzero_ps(); }
  static wide no_sum() { return _mm512_setzero_pd(); }
  static half load_half(const float* p) { return _mm256_loadu_ps(p); }
  static void store_half(float* p, half v) { _mm256_storeu_ps(p, v); }
  static void store_wide(double* p, wide v) { _mm512_storeu_pd(p, v); }
  static half magnitude(half v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
  static half larger(half a, half b) { return _mm256_max_ps(a, b); }
  // The form without a mask makes gcc 12 warn of an uninitialised register.
  static wide widen(half v) { return _mm512_maskz_cvtps_pd(0xff, v); }
  static wide add_square(wide v, wide sum) { return _mm512_fmadd_pd(v, v, sum); }
};
#endif

// Rows x (Vectors * lanes) entries of y in registers; every entry of a is spread over a vector once.
template <class Vector, int Rows, int Vectors>
inline __attribute__((always_inline)) void times_tile(const float* a, int64_t k, int64_t lda, const float* x, int64_t n,
                                                      float alpha, float* y) {
  typename Vector::type sum[Rows][Vectors];
  const float* row[Rows];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    row[i] = a + i * lda;
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[i][v] = Vector::spread(0.0f);
  }
  for (int64_t l = 0; l < k; ++l, x += n) {
    typename Vector::type right[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) right[v] = Vector::load(x + v * Vector::kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const auto left = Vector::spread(row[i][l]);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[i][v] = Vector::multiply_add(left, right[v], sum[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      Vector::store(y + i * n + v * Vector::kLanes, Vector::multiply(Vector::spread(alpha), sum[i][v]));
    }
  }
}

template <class Vector, int Rows, int Vectors>
void times_strip(const float* a, int64_t m, int64_t k, int64_t lda, const float* x, int64_t n, float alpha, float* y) {
  int64_t i = 0;
  for (; i + Rows <= m; i += Rows) times_tile<Vector, Rows, Vectors>(a + i * lda, k, lda, x, n, alpha, y + i * n);
  for (; i < m; ++i) times_tile<Vector, 1, Vectors>(a + i * lda, k, lda, x, n, alpha, y + i * n);
}

// Rows x (Vectors * lanes) entries of out in registers; x is a strip, kStrip numbers a row.
template <class Vector, int Rows, int Vectors>
inline __attribute__((always_inline)) void plus_tile(const float* a, int64_t k, int64_t lda, const float* x,
                                                     const float* base, int64_t ldbase, float* out, int64_t ldout) {
  typename Vector::type sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[i][v] = Vector::load(base + i * ldbase + v * Vector::kLanes);
  }
  for (int64_t l = 0; l < k; ++l, x += kStrip) {
    typename Vector::type right[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) right[v] = Vector::load(x + v * Vector::kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const auto left = Vector::spread(a[i * lda + l]);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[i][v] = Vector::multiply_add(left, right[v], sum[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) Vector::store(out + i * ldout + v * Vector::kLanes, sum[i][v]);
  }
}

template <class Vector, int Rows, int Vectors>
void plus_all(const float* a, int64_t m, int64_t k, int64_t lda, const float* x, int64_t n, const float* base,
              int64_t ldbase, float* out, int64_t ldout) {
  constexpr int64_t kWide = Vectors * Vector::kLanes;
  for (int64_t i = 0; i < m; i += Rows, a += Rows * lda, base += Rows * ldbase, out += Rows * ldout) {
    const int64_t rows = m - i < Rows ? m - i : Rows;
    for (int64_t j = 0; j < n; j += kWide) {
      const float* const strip = x + j / kStrip * k * kStrip + j % kStrip;
      if (rows == Rows && j + kWide <= n) {
        plus_tile<Vector, Rows, Vectors>(a, k, lda, strip, base + j, ldbase, out + j, ldout);
        continue;
      }
      const int64_t width = n - j < kWide ? n - j : kWide;
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t c = 0; c < width; ++c) {
          float sum = base[row * ldbase + j + c];
          for (int64_t l = 0; l < k; ++l) sum = __builtin_fmaf(a[row * lda + l], strip[l * kStrip + c], sum);
          out[row * ldout + j + c] = sum;
        }
      }
    }
  }
}

// Columns x (Vectors * lanes) entries of z in registers; every entry of y is spread over a vector once.
template <class Vector, int Columns, int Vectors>
inline __attribute__((always_inline)) void back_tile(const float* a, int64_t m, int64_t lda, const float* y, int64_t n,
                                                     float alpha, bool add, float* z, int64_t k) {
  typename Vector::type sum[Columns][Vectors];
#pragma GCC unroll 16
  for (int j = 0; j < Columns; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[j][v] = Vector::spread(0.0f);
  }
  for (int64_t i = 0; i < m; ++i, a += lda, y += n) {
    typename Vector::type left[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) left[v] = Vector::load(a + v * Vector::kLanes);
#pragma GCC unroll 16
    for (int j = 0; j < Columns; ++j) {
      const auto right = Vector::spread(y[j]);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[j][v] = Vector::multiply_add(left[v], right, sum[j][v]);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < Columns; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      float* const out = z + j * k + v * Vector::kLanes;
      const auto before = add ? Vector::load(out) : Vector::spread(0.0f);
      Vector::store(out, Vector::multiply_add(Vector::spread(alpha), sum[j][v], before));
    }
  }
}

template <class Vector, int Columns, int Vectors>
void back_all(const float* a, int64_t m, int64_t k, int64_t lda, const float* y, int64_t n, float alpha, bool add,
              float* z) {
  constexpr int64_t kWide = Vectors * Vector::kLanes;
  int64_t l = 0;
  for (; l + kWide <= k; l += kWide) {
    for (int64_t j = 0; j < n; j += Columns) {
      back_tile<Vector, Columns, Vectors>(a + l, m, lda, y + j, n, alpha, add, z + j * k + l, k);
    }
  }
  for (; l + Vector::kLanes <= k; l += Vector::kLanes) {
    for (int64_t j = 0; j < n; j += Columns) {
      back_tile<Vector, Columns, 1>(a + l, m, lda, y + j, n, alpha, add, z + j * k + l, k);
    }
  }
  for (; l < k; ++l) {
    for (int64_t j = 0; j < n; ++j) {
      float sum = 0;
      for (int64_t i = 0; i < m; ++i) sum += a[i * lda + l] * y[i * n + j];
      z[j * k + l] = alpha * sum + (add ? z[j * k + l] : 0.0f);
    }
  }
}

template <class Vector>
void scan(const float* a, int64_t count, float* largest, double* squares) {
  constexpr int kUnroll = 4, kLanes = Vector::kWide;
  typename Vector::wide sum[kUnroll];
  typename Vector::half most[kUnroll];
#pragma GCC unroll 4
  for (int u = 0; u < kUnroll; ++u) sum[u] = Vector::no_sum(), most[u] = Vector::magnitude(Vector::no_half());
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= count; i += kUnroll * kLanes) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      const auto x = Vector::load_half(a + i + u * kLanes);
      most[u] = Vector::larger(most[u], Vector::magnitude(x));
      const auto wide = Vector::widen(x);
      sum[u] = Vector::add_square(wide, sum[u]);
    }
  }
  float m = *largest;
  double s = 0;
  for (int u = 0; u < kUnroll; ++u) {
    float parts[kLanes];
    double sums[kLanes];
    Vector::store_half(parts, most[u]);
    Vector::store_wide(sums, sum[u]);
    for (int e = 0; e < kLanes; ++e) m = parts[e] > m ? parts[e] : m, s += sums[e];
  }
  for (; i < count; ++i) {
    const float x = a[i] < 0 ? -a[i] : a[i];
    m = x > m ? x : m;
    s += double(x) * double(x);
  }
  *largest = m;
  *squares += s;
}

}  // namespace
}  // namespace osora::cpu
