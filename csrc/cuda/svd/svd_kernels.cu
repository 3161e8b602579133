// SPDX-License-Identifier: Apache-2.0
// The weights, moves, random numbers and lengths of columns.
#include <cmath>

#include "core/philox.h"
#include "cuda/svd/svd_kernels.h"
#include "cuda/svd/svd_steps.cuh"

namespace osora::cuda {
namespace {

constexpr int64_t kRows = 16;      // of a weight, for one block
constexpr int64_t kCopied = 4096;  // numbers, by one block
constexpr int kWords = 64;         // a launch takes 4 KiB of arguments

// -- the weights ------------------------------------------------------------------------------------------------------

// Rows kRows * part ... of a weight.
template <class T>
struct LargestOfRows {
  const void* const* addresses;
  int64_t d, k, parts;
  double* partial;
  __device__ void operator()(int64_t b, int64_t part) const {
    const T* const w = static_cast<const T*>(addresses[b]);
    double largest = 0;
    for (int64_t i = part * kRows; i < (part + 1) * kRows && i < d; ++i) {
      for (int64_t j = threadIdx.x; j < k; j += kThreads) {
        largest = Largest()(static_cast<double>(fabs(widen(w[i * k + j]))), largest);
      }
    }
    largest = block_reduce(largest, Largest());
    if (threadIdx.x == 0) partial[b * parts + part] = largest;
  }
};

struct Exponent {
  const double* partial;
  int64_t parts;
  int* out;
  __device__ void operator()(int64_t b, int64_t) const {
    double largest = 0;
    for (int64_t p = threadIdx.x; p < parts; p += kThreads) largest = Largest()(partial[b * parts + p], largest);
    largest = block_reduce(largest, Largest());
    if (threadIdx.x == 0) out[b] = largest > 0 ? ilogb(largest) + 1 : 0;
  }
};

template <class T, class To>
struct ScaleRows {
  const void* const* addresses;
  int64_t d, k, parts;
  const int* exponents;
  double* partial;
  View<To> out;
  __device__ void operator()(int64_t b, int64_t part) const {
    const T* const w = static_cast<const T*>(addresses[b]);
    const int exponent = exponents[b];
    double squares = 0;
    for (int64_t i = part * kRows; i < (part + 1) * kRows && i < d; ++i) {
      To* const row = out.column(b, i);
      for (int64_t j = threadIdx.x; j < out.rows; j += kThreads) {
        const auto value = j < k ? ldexp(widen(w[i * k + j]), -exponent) : 0;
        narrow(static_cast<decltype(widen(To()))>(value), row[j]);
        squares += static_cast<double>(value) * static_cast<double>(value);
      }
    }
    squares = block_reduce(squares, Sum());
    if (threadIdx.x == 0) partial[b * parts + part] = squares;
  }
};

struct RootOfSum {
  const double* partial;
  int64_t parts;
  double* out;
  __device__ void operator()(int64_t b, int64_t) const {
    double sum = 0;
    for (int64_t p = threadIdx.x; p < parts; p += kThreads) sum += partial[b * parts + p];
    sum = block_reduce(sum, Sum());
    if (threadIdx.x == 0) out[b] = sqrt(sum);
  }
};

template <class T>
void scale_to(const Sources& w, const int* exponents, double* partial, const Matrices& out, Stream stream) {
  const int64_t parts = weight_partials(w.d);
  const auto launch_to = [&](auto to) {
    using To = decltype(to);
    for_columns(ScaleRows<T, To>{w.addresses, w.d, w.k, parts, exponents, partial, View<To>(out)}, parts, w.batch,
                stream);
  };
  if (out.type == Type::kFloat64) return launch_to(double());
  if constexpr (sizeof(T) == 2) {
    if (out.type == Type::kBFloat16) return launch_to(__nv_bfloat16());
  }
  if constexpr (sizeof(T) < 8) launch_to(float());
}

template <class Call>
void with_weight_type(Type type, Call call) {
  if (type == Type::kBFloat16) {
    call(__nv_bfloat16());
  } else if (type == Type::kFloat16) {
    call(__half());
  } else {
    with_type(type, call);
  }
}

// -- moves ------------------------------------------------------------------------------------------------------------

struct Words {
  uint64_t at[kWords];
};
__global__ void __launch_bounds__(kThreads) words_kernel(Words words, int count, uint64_t* out) {
  for (int k = threadIdx.x; k < count; k += kThreads) out[k] = words.at[k];
}

struct Addresses {
  char* data;
  int64_t bytes, batch;
  void** out;
  __device__ void operator()(int64_t, int64_t part) const {
    const int64_t b = part * kThreads + threadIdx.x;
    if (b < batch) out[b] = data + b * bytes;
  }
};

template <class From, class To>
struct Copy {
  View<const From> from;
  View<To> out;
  int64_t count;
  __device__ void operator()(int64_t b, int64_t part) const {
    const From* const source = from.column(b, 0);
    To* const target = out.column(b, 0);
    const int64_t end = (part + 1) * kCopied < count ? (part + 1) * kCopied : count;
    for (int64_t i = part * kCopied + threadIdx.x; i < end; i += kThreads) target[i] = static_cast<To>(source[i]);
  }
};
// The same out of bfloat16, which has no conversions of its own.
struct Widen {
  View<const __nv_bfloat16> from;
  View<double> out;
  int64_t count;
  __device__ void operator()(int64_t b, int64_t part) const {
    const __nv_bfloat16* const source = from.column(b, 0);
    double* const target = out.column(b, 0);
    const int64_t end = (part + 1) * kCopied < count ? (part + 1) * kCopied : count;
    for (int64_t i = part * kCopied + threadIdx.x; i < end; i += kThreads) target[i] = widen(source[i]);
  }
};

template <class From, class To>
void copy_as(const Matrices& from, const Matrices& out, Stream stream) {
  const int64_t count = from.rows * from.cols;
  for_columns(Copy<From, To>{View<const From>(from), View<To>(out), count}, ceil_div(count, kCopied), from.batch,
              stream);
}

template <class T>
struct Gather {
  View<const T> from;
  const int* which;
  View<T> out;
  __device__ void operator()(int64_t b, int64_t j) const {
    const T* const source = from.column(b, which[b * out.cols + j]);
    T* const target = out.column(b, j);
    for (int64_t i = threadIdx.x; i < out.rows; i += kThreads) target[i] = source[i];
  }
};

// number -> terms[0] + terms[cols] + ..., to 8 bits each, at `row` of column j.
__device__ __forceinline__ void split_number(float number, int terms, const View<__nv_bfloat16>& out, int64_t b,
                                             int64_t cols, int64_t j, int64_t row) {
  for (int t = 0; t < terms; ++t) {
    __nv_bfloat16 term;
    narrow(number, term);
    number -= widen(term);  // exact: the rounding error of a float32 number is one
    out.column(b, t * cols + j)[row] = term;
  }
}

struct Split {
  View<const float> from;
  const int* which;
  int64_t cols;
  int terms;
  View<__nv_bfloat16> out;
  __device__ void operator()(int64_t b, int64_t j) const {
    const float* const source = from.column(b, which ? which[b * cols + j] : j);
    for (int64_t i = threadIdx.x; i < out.rows; i += kThreads) {
      split_number(i < from.rows ? source[i] : 0, terms, out, b, cols, j, i);
    }
  }
};

struct SumTerms {
  View<const float> from;
  int terms;
  View<float> out;
  View<__nv_bfloat16> next;
  double* norms;
  __device__ void operator()(int64_t b, int64_t j) const {
    const float* const first = from.column(b, j);
    const float* const second = from.column(b, out.cols + j);
    const float* const third = from.column(b, (terms - 1) * out.cols + j);
    float* const target = out.column(b, j);
    double squares = 0;
    for (int64_t i = threadIdx.x; i < out.rows; i += kThreads) {
      const float sum = first[i] + (terms == 3 ? second[i] + third[i] : second[i]);
      target[i] = sum;
      squares = multiply_add(static_cast<double>(sum), static_cast<double>(sum), squares);
      if (next.data) split_number(sum, terms, next, b, out.cols, j, i);
    }
    if (!next.data) return;
    for (int64_t i = out.rows + threadIdx.x; i < next.rows; i += kThreads) {
      split_number(0, terms, next, b, out.cols, j, i);
    }
    squares = block_reduce(squares, Sum());
    if (threadIdx.x == 0) norms[b * out.cols + j] = sqrt(squares);
  }
};

// -- columns ----------------------------------------------------------------------------------------------------------

template <class T>
struct Normal {
  View<T> out;
  Random random;
  __device__ void operator()(int64_t b, int64_t j) const {
    T* const target = out.column(b, j);
    for (int64_t i = threadIdx.x; i < out.rows; i += kThreads) {
      target[i] = static_cast<T>(normal_number(random, b, i * out.cols + j));
    }
  }
};

template <class T>
struct Norms {
  View<const T> from;
  double* out;
  __device__ void operator()(int64_t b, int64_t j) const {
    const double norm = length(from.column(b, j), from.rows);
    if (threadIdx.x == 0) out[b * from.cols + j] = norm;
  }
};

struct RaiseToLargest {
  const double* values;
  int64_t count;
  double* out;
  __device__ void operator()(int64_t b, int64_t) const {
    double largest = 0;
    for (int64_t j = threadIdx.x; j < count; j += kThreads) largest = Largest()(values[b * count + j], largest);
    largest = block_reduce(largest, Largest());
    if (threadIdx.x == 0) out[b] = Largest()(largest, out[b]);
  }
};

template <class T>
struct Unit {
  View<T> matrices;
  Noise noise;
  Random random;
  double* lengths;
  __device__ void operator()(int64_t b, int64_t j) const {
    T* const column = matrices.column(b, j);
    double norm = length(column, matrices.rows);
    if (lengths && threadIdx.x == 0) lengths[b * matrices.cols + j] = norm;
    const double level = noise_level(noise, b, matrices.cols);
    if (!(norm > noise_limit(noise, level, b, j, matrices.cols) && norm < INFINITY)) {
      for (int64_t i = threadIdx.x; i < matrices.rows; i += kThreads) {
        column[i] = static_cast<T>(normal_number(random, b, i * matrices.cols + j));
      }
      norm = length(column, matrices.rows);  // a thread reads what it wrote itself
    }
    const double inverse = 1 / norm;
    for (int64_t i = threadIdx.x; i < matrices.rows; i += kThreads) column[i] = static_cast<T>(column[i] * inverse);
  }
};

}  // namespace

int64_t weight_partials(int64_t d) { return ceil_div(d, kRows); }

void weight_exponents(const Sources& w, double* partial, int* out, Stream stream) {
  const int64_t parts = weight_partials(w.d);
  with_weight_type(w.type, [&](auto type) {
    for_columns(LargestOfRows<decltype(type)>{w.addresses, w.d, w.k, parts, partial}, parts, w.batch, stream);
  });
  for_columns(Exponent{partial, parts, out}, 1, w.batch, stream);
}

void scale_weights(const Sources& w, const int* exponents, double* partial, const Matrices& out, double* norms,
                   Stream stream) {
  with_weight_type(w.type, [&](auto type) { scale_to<decltype(type)>(w, exponents, partial, out, stream); });
  for_columns(RootOfSum{partial, weight_partials(w.d), norms}, 1, w.batch, stream);
}

void store_words(const uint64_t* host, int64_t count, uint64_t* out, Stream stream) {
  for (int64_t first = 0; first < count; first += kWords) {
    Words words{};
    const int now = static_cast<int>(count - first < kWords ? count - first : kWords);
    for (int k = 0; k < now; ++k) words.at[k] = host[first + k];
    launch(words_kernel, dim3(1), dim3(kThreads), 0, stream, words, now, out + first);
  }
}

void matrix_addresses(const Matrices& matrices, void** out, Stream stream) {
  const int64_t bytes = matrices.stride * size_of(matrices.type);
  for_columns(Addresses{static_cast<char*>(matrices.data), bytes, matrices.batch, out},
              ceil_div(matrices.batch, kThreads), 1, stream);
}

void copy(const Matrices& from, const Matrices& out, Stream stream) {
  const int64_t count = from.rows * from.cols;
  if (from.type == Type::kBFloat16) {
    return for_columns(Widen{View<const __nv_bfloat16>(from), View<double>(out), count}, ceil_div(count, kCopied),
                       from.batch, stream);
  }
  if (from.type == Type::kFloat64 && out.type == Type::kFloat32) return copy_as<double, float>(from, out, stream);
  if (from.type == Type::kFloat32 && out.type == Type::kFloat64) return copy_as<float, double>(from, out, stream);
  // Of one type: only its size matters.
  if (size_of(from.type) == 8) return copy_as<uint64_t, uint64_t>(from, out, stream);
  copy_as<uint32_t, uint32_t>(from, out, stream);
}

void gather_columns(const Matrices& from, const int* which, const Matrices& out, Stream stream) {
  with_type(from.type, [&](auto type) {
    using T = decltype(type);
    for_columns(Gather<T>{View<const T>(from), which, View<T>(out)}, out.cols, out.batch, stream);
  });
}

void split_terms(const Matrices& from, const int* which, int terms, const Matrices& out, Stream stream) {
  const int64_t cols = out.cols / terms;
  for_columns(Split{View<const float>(from), which, cols, terms, View<__nv_bfloat16>(out)}, cols, from.batch, stream);
}

void sum_terms(const Matrices& from, int terms, const Matrices& out, Stream stream) {
  sum_and_split_terms(from, terms, out, Matrices(), nullptr, stream);
}

void sum_and_split_terms(const Matrices& from, int terms, const Matrices& out, const Matrices& next, double* norms,
                         Stream stream) {
  for_columns(SumTerms{View<const float>(from), terms, View<float>(out), View<__nv_bfloat16>(next), norms}, out.cols,
              out.batch, stream);
}

void fill_normal(const Matrices& out, const Random& random, Stream stream) {
  with_type(out.type, [&](auto type) {
    for_columns(Normal<decltype(type)>{View<decltype(type)>(out), random}, out.cols, out.batch, stream);
  });
}

void column_norms(const Matrices& from, double* out, Stream stream) {
  with_type(from.type, [&](auto type) {
    using T = decltype(type);
    for_columns(Norms<T>{View<const T>(from), out}, from.cols, from.batch, stream);
  });
}

void raise_to_largest(const double* values, int64_t count, int64_t batch, double* out, Stream stream) {
  for_columns(RaiseToLargest{values, count, out}, 1, batch, stream);
}

void unit_columns(const Matrices& matrices, const Noise& noise, const Random& random, double* lengths, Stream stream) {
  with_type(matrices.type, [&](auto type) {
    using T = decltype(type);
    for_columns(Unit<T>{View<T>(matrices), noise, random, lengths}, matrices.cols, matrices.batch, stream);
  });
}

}  // namespace osora::cuda
