// SPDX-License-Identifier: Apache-2.0
// Cholesky QR of a few columns in two kernels a round: Gram matrices of strips of rows, then every strip factors their
// sum for itself and solves its own rows. That costs n^3 / 6 operations a strip, and saves a launch and a wait.
//
// A strip is kStrip rows of one matrix; every sum is in float64 and in a fixed order.
#include <cmath>
#include <type_traits>

#include "cuda/svd/svd_kernels.h"
#include "cuda/svd/svd_steps.cuh"

namespace osora::cuda {
namespace {

constexpr int kStrip = kThreads;  // rows: one per thread where they are solved
constexpr int kTile = 64;         // of them in shared memory at a time
constexpr int kSide = 16;         // threads stand in a square over a matrix of the columns
constexpr int kTogether = 8;      // columns that a thread makes at a time, of its row
constexpr int kInside = 64;       // rows of V^T z in shared memory at a time
constexpr int kReduce = block_reduce_bytes(kThreads) / 8;

// Three blocks on one SM: 16 sums of 64-bit numbers and what they are made of want some 80 registers.
template <class Step>
__global__ void __launch_bounds__(kThreads, 3) strips_kernel(Step step, unsigned strips) {
  step(blockIdx.x / strips, blockIdx.x % strips);
}

template <class Step>
void for_strips(const Step& step, int64_t rows, int64_t batch, int64_t doubles, Stream stream) {
  const int64_t strips = row_strips(rows);
  if (strips * batch == 0) return;
  launch(strips_kernel<Step>, dim3(strips * batch), dim3(kThreads), static_cast<size_t>(doubles) * sizeof(double),
         stream, step, strips);
}

struct Rows {
  int64_t begin, end;
  __device__ __forceinline__ Rows(int64_t strip, int64_t rows)
      : begin(strip * kStrip), end(begin + kStrip < rows ? begin + kStrip : rows) {}
};

// parts[b, strip, j, i] = the strip's z_i . z_j; kCells^2 of them by each thread.
template <class T, int kCells>
struct GramParts {
  View<const T> z;
  int64_t strips;
  const int* wanted;
  double* parts;
  __device__ void operator()(int64_t b, int64_t strip) const {
    if (wanted && !wanted[b]) return;
    const int n = static_cast<int>(z.cols), ld = n | 1;  // odd: a column's rows lie in different banks
    const int left = threadIdx.x % kSide, top = threadIdx.x / kSide;
    double* const tile = dynamic_shared<double>();  // [kTile, ld]
    const Rows mine(strip, z.rows);
    double sums[kCells][kCells] = {};
    for (int64_t first = mine.begin; first < mine.end; first += kTile) {
      for (int e = threadIdx.x; e < kTile * n; e += kThreads) {
        const int row = e % kTile, col = e / kTile;
        tile[row * ld + col] = first + row < mine.end ? static_cast<double>(z.column(b, col)[first + row]) : 0.0;
      }
      __syncthreads();
      for (int row = 0; row < kTile; ++row) {
        double x[kCells], y[kCells];
#pragma unroll
        for (int c = 0; c < kCells; ++c) {
          // Beyond the last column: some number, whose products nobody stores.
          x[c] = tile[row * ld + (left + c * kSide < n ? left + c * kSide : 0)];
          y[c] = tile[row * ld + (top + c * kSide < n ? top + c * kSide : 0)];
        }
#pragma unroll
        for (int j = 0; j < kCells; ++j) {
#pragma unroll
          for (int i = 0; i < kCells; ++i) sums[j][i] = multiply_add(x[i], y[j], sums[j][i]);
        }
      }
      __syncthreads();
    }
    double* const out = parts + (b * strips + strip) * n * n;
#pragma unroll
    for (int c = 0; c < kCells * kCells; ++c) {
      const int i = left + c % kCells * kSide, j = top + c / kCells * kSide;
      if (i < n && j < n) out[j * n + i] = sums[c / kCells][c % kCells];
    }
  }
};

template <class T>
struct SolveStrip {
  View<T> z;
  int64_t strips;
  const double* parts;
  Noise noise;
  Random random;
  double shift, least;
  const int* wanted;
  int* again;

  // 1 / |column|, or 0 for what is no column.
  __device__ void find_scales(int64_t b, const double* gram, int ld, double* scales) const {
    const int n = static_cast<int>(z.cols);
    const double level = noise_level(noise, b, n);
    for (int j = threadIdx.x; j < n; j += kThreads) {
      const double length = sqrt(gram[j * ld + j]);
      const bool good = length > noise_limit(noise, level, b, j, n) && length < INFINITY;
      scales[j] = good ? 1 / length : 0;
    }
    __syncthreads();
  }

  // The Gram matrix of the scaled columns, at [i, j <= i] of `gram`, to the inverse X of its factor L: X_ij comes to
  // [j, i >= j], and L_ic lies at [i, c < i] on the way. Where the pivot is at the rounding level, and where there is
  // no column, L and X are zero: it has no part in the others. Returns the smallest pivot times the length of its
  // column, which is 1 for orthonormal columns.
  __device__ double invert(double* gram, int ld, const double* scales) const {
    const int n = static_cast<int>(z.cols), left = threadIdx.x % kSide, top = threadIdx.x / kSide;
    double smallest = INFINITY;
    for (int c = 0; c < n; ++c) {
      const double square = gram[c * ld + c];
      const bool usable = scales[c] != 0 && square > least * least;
      const double inverse = usable ? 1 / sqrt(square) : 0;
      smallest = Smallest()(usable ? sqrt(square) / scales[c] : 0, smallest);
      __syncthreads();  // everybody has read the pivot
      for (int e = threadIdx.x; e < n; e += kThreads) {
        gram[e * ld + c] = e == c ? inverse : gram[e * ld + c] * inverse;  // X_ce, X_cc, L_ec
      }
      __syncthreads();
      for (int i = c + 1 + top; i < n; i += kSide) {
        const double l = gram[i * ld + c];
        for (int j = left; j <= i; j += kSide) {
          double& entry = j > c ? gram[i * ld + j] : gram[j * ld + i];
          entry = multiply_add(-l, gram[j * ld + c], entry);  // L_jc, or X_cj
        }
      }
      __syncthreads();
    }
    return smallest;
  }

  __device__ void operator()(int64_t b, int64_t strip) const {
    if (wanted && !wanted[b]) return;
    const int n = static_cast<int>(z.cols), ld = n | 1;         // odd: rows lie in different banks
    double* const scales = dynamic_shared<double>() + kReduce;  // [n]
    double* const gram = scales + n;                            // [n, ld]
    const double* const mine = parts + b * strips * n * n;
    for (int e = threadIdx.x; e < n * n; e += kThreads) {
      const int i = e / n, j = e % n;
      gram[i * ld + j] = j <= i ? strided_sum(mine + e, strips, int64_t{n} * n) : 0;
    }
    __syncthreads();
    find_scales(b, gram, ld, scales);
    for (int e = threadIdx.x; e < n * n; e += kThreads) {
      const int i = e / n, j = e % n;
      double& entry = gram[i * ld + j];
      if (i == j) entry = 1 + shift;
      if (j < i) entry = scales[i] != 0 && scales[j] != 0 ? entry * scales[i] * scales[j] : 0;
    }
    __syncthreads();
    const double smallest = invert(gram, ld, scales);
    if (again && strip == 0 && threadIdx.x == 0) again[b] = !(smallest > kWellConditioned);

    const Rows rows(strip, z.rows);
    const int64_t row = rows.begin + threadIdx.x;
    if (row >= rows.end) return;
    // Orthonormal columns come out as they were: the shift has made the factor longer by this.
    const double longer = sqrt(1 + shift), drawn = 1 / sqrt(static_cast<double>(z.rows));
    // Column i is made of the columns up to i: from the last one on, none is missed that was written over.
    for (int first = (n - 1) / kTogether * kTogether; first >= 0; first -= kTogether) {
      double sums[kTogether] = {};
      const int end = first + kTogether < n ? first + kTogether : n;
      for (int j = 0; j < end; ++j) {
        if (scales[j] == 0) continue;  // it may hold NaN
        const double x = static_cast<double>(z.column(b, j)[row]) * scales[j];
#pragma unroll
        for (int e = 0; e < kTogether; ++e) {
          if (first + e >= j && first + e < n) sums[e] = multiply_add(x, gram[j * ld + first + e], sums[e]);
        }
      }
#pragma unroll
      for (int e = 0; e < kTogether; ++e) {
        if (first + e >= n) break;
        z.column(b, first + e)[row] = static_cast<T>(sums[e] * longer);
      }
    }
    for (int i = 0; i < n; ++i) {
      if (gram[i * ld + i] != 0) continue;
      z.column(b, i)[row] = static_cast<T>(drawn * normal_number(random, b, row * n + i));
    }
  }
};

// parts[b, strip, j, w] = the strip's v_w . z_j, by a warp each.
template <class T>
struct InnerParts {
  View<const T> v, z;
  int64_t strips;
  const int* wanted;
  double* parts;
  __device__ void operator()(int64_t b, int64_t strip) const {
    if (wanted && !wanted[b]) return;
    const Rows rows(strip, z.rows);
    const int64_t pairs = v.cols * z.cols;
    for (int64_t p = threadIdx.x / 32; p < pairs; p += kThreads / 32) {
      const T* const left = v.column(b, p % v.cols);
      const T* const right = z.column(b, p / v.cols);
      double sum = 0;
      for (int64_t i = rows.begin + threadIdx.x % 32; i < rows.end; i += 32) {
        sum = multiply_add(static_cast<double>(left[i]), static_cast<double>(right[i]), sum);
      }
      sum = group_sum(sum, 32);
      if (threadIdx.x % 32 == 0) parts[(b * strips + strip) * pairs + p] = sum;
    }
  }
};

template <class T>
struct SubtractInside {
  View<const T> v;
  View<T> z;
  int64_t strips;
  const double* parts;
  const int* wanted;
  __device__ void operator()(int64_t b, int64_t strip) const {
    if (wanted && !wanted[b]) return;
    const int64_t width = v.cols, row = strip * kStrip + threadIdx.x;
    const double* const mine = parts + b * strips * width * z.cols;
    double* const inside = dynamic_shared<double>();  // [kTogether, kInside]
    for (int64_t first = 0; first < z.cols; first += kTogether) {
      const int cols = static_cast<int>(z.cols - first < kTogether ? z.cols - first : kTogether);
      double sums[kTogether] = {};
      for (int64_t w = 0; w < width; w += kInside) {
        const int count = static_cast<int>(width - w < kInside ? width - w : kInside);
        for (int e = threadIdx.x; e < cols * kInside; e += kThreads) {
          const int j = e / kInside, i = e % kInside;
          inside[e] = i < count ? strided_sum(mine + (first + j) * width + w + i, strips, width * z.cols) : 0;
        }
        __syncthreads();
        for (int i = 0; i < count && row < z.rows; ++i) {
          const double x = static_cast<double>(v.column(b, w + i)[row]);
#pragma unroll
          for (int j = 0; j < kTogether; ++j) {
            if (j < cols) sums[j] = multiply_add(x, inside[j * kInside + i], sums[j]);
          }
        }
        __syncthreads();
      }
      if (row >= z.rows) continue;
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        if (j >= cols) break;
        T& entry = z.column(b, first + j)[row];
        entry = static_cast<T>(static_cast<double>(entry) - sums[j]);
      }
    }
  }
};

// call(constant) with the smallest of 16, 32 and 64 that is not below n.
template <class Call>
void with_columns(int64_t n, Call call) {
  if (n <= 16) {
    call(std::integral_constant<int, 16>());
  } else if (n <= 32) {
    call(std::integral_constant<int, 32>());
  } else {
    call(std::integral_constant<int, 64>());
  }
}

}  // namespace

int64_t row_strips(int64_t rows) { return ceil_div(rows, kStrip); }

void gram_parts(const Matrices& z, const int* wanted, double* parts, Stream stream) {
  with_type(z.type, [&](auto type) {
    using T = decltype(type);
    with_columns(z.cols, [&](auto most) {
      for_strips(GramParts<T, most / kSide>{View<const T>(z), row_strips(z.rows), wanted, parts}, z.rows, z.batch,
                 kTile * (z.cols | 1), stream);
    });
  });
}

void solve_strips(const Matrices& z, const double* parts, const CholeskyRound& round, Stream stream) {
  with_type(z.type, [&](auto type) {
    using T = decltype(type);
    for_strips(SolveStrip<T>{View<T>(z), row_strips(z.rows), parts, round.noise, round.random, round.shift, round.least,
                             round.wanted, round.again},
               z.rows, z.batch, kReduce + z.cols + z.cols * (z.cols | 1), stream);
  });
}

void inner_parts(const Matrices& v, const Matrices& z, const int* wanted, double* parts, Stream stream) {
  with_type(z.type, [&](auto type) {
    using T = decltype(type);
    for_strips(InnerParts<T>{View<const T>(v), View<const T>(z), row_strips(z.rows), wanted, parts}, z.rows, z.batch, 0,
               stream);
  });
}

void subtract_inside(const Matrices& v, const double* parts, const int* wanted, const Matrices& z, Stream stream) {
  with_type(z.type, [&](auto type) {
    using T = decltype(type);
    for_strips(SubtractInside<T>{View<const T>(v), View<T>(z), row_strips(z.rows), parts, wanted}, z.rows, z.batch,
               kTogether * kInside, stream);
  });
}

}  // namespace osora::cuda
