// SPDX-License-Identifier: Apache-2.0
// Cholesky factors, eigenvectors, Rayleigh-Ritz and the answer.
#include <cmath>

#include "cuda/svd/svd_kernels.h"
#include "cuda/svd/svd_steps.cuh"

namespace osora::cuda {
namespace {

// -- Cholesky, eigenvectors -------------------------------------------------------------------------------------------

struct ShiftGram {
  View<double> gram;
  double shift;
  View<double> identity;
  __device__ void operator()(int64_t b, int64_t j) const {
    double* const column = identity.column(b, j);
    for (int64_t i = threadIdx.x; i < identity.rows; i += kThreads) column[i] = i == j;
    if (threadIdx.x == 0) gram.column(b, j)[j] += shift;
  }
};

template <class T>
struct UsableInverse {
  View<const double> factor, inverse;
  const int* info;
  double least;
  int* failed;
  View<T> out;
  __device__ void operator()(int64_t b, int64_t j) const {
    const double* const column = inverse.column(b, j);
    T* const target = out.column(b, j);
    for (int64_t i = threadIdx.x; i < out.rows; i += kThreads) {
      const bool good = info[b] == 0 && factor.column(b, i)[i] > least;
      target[i] = good ? static_cast<T>(column[i]) : T(0);
    }
    if (threadIdx.x == 0 && j == 0 && info[b] != 0) failed[b] = 1;
  }
};

struct Descending {
  const double* w;
  View<const double> vectors;
  const int* info;
  View<double> lambda, q;
  double* sigma;
  int* failed;
  __device__ void operator()(int64_t b, int64_t j) const {
    const int64_t n = q.rows;
    const double largest = w[b * n + n - 1];
    const bool good = info[b] == 0 && largest < INFINITY;  // false for NaN
    const double* const source = vectors.column(b, n - 1 - j);
    double* const target = q.column(b, j);
    for (int64_t i = threadIdx.x; i < n; i += kThreads) target[i] = good ? source[i] : 0;
    if (threadIdx.x != 0) return;
    lambda.column(b, 0)[j] = good ? fmax(w[b * n + n - 1 - j], 0.0) : 0;
    if (j != 0) return;
    sigma[b] = good ? sqrt(fmax(largest, 0.0)) : 0;
    if (!good) failed[b] = 1;
  }
};

struct MarkFailures {
  const int* info;
  int64_t batch;
  int* failed;
  __device__ void operator()(int64_t, int64_t part) const {
    const int64_t b = part * kThreads + threadIdx.x;
    if (b < batch && info[b] != 0) failed[b] = 1;
  }
};

struct Defect {
  View<const double> gram;
  double* out;
  __device__ void operator()(int64_t b, int64_t) const {
    double defect = 0;
    for (int64_t j = 0; j < gram.cols; ++j) {
      const double* const column = gram.column(b, j);
      for (int64_t i = threadIdx.x; i < gram.rows; i += kThreads) {
        defect = Largest()(fabs(column[i] - (i == j)), defect);
      }
    }
    defect = block_reduce(defect, Largest());
    if (threadIdx.x == 0) out[b] = defect;
  }
};

// -- Rayleigh-Ritz ----------------------------------------------------------------------------------------------------

// A NaN would break the order, and leave places without a number.
__device__ __forceinline__ double ordered(double x) { return x < INFINITY ? x : INFINITY; }

struct LongestTails {
  View<const double> q;
  int64_t block, count;
  double* tails;
  int* out;
  __device__ void operator()(int64_t b, int64_t) const {
    double* const mine = tails + b * count;
    for (int64_t j = threadIdx.x; j < count; j += kThreads) {
      const double* const tail = q.column(b, j) + (q.rows - block);
      double squares = 0;
      for (int64_t i = 0; i < block; ++i) squares = multiply_add(tail[i], tail[i], squares);
      mine[j] = ordered(squares);
    }
    __syncthreads();
    for (int64_t j = threadIdx.x; j < count; j += kThreads) {
      int64_t place = 0;
      for (int64_t i = 0; i < count; ++i) place += mine[i] > mine[j] || (mine[i] == mine[j] && i < j);
      if (place < block) out[b * block + place] = static_cast<int>(j);
    }
  }
};

struct LargestFirst {
  const double* values;
  int64_t count, keep;
  int* out;
  __device__ void operator()(int64_t b, int64_t j) const {
    const double mine = ordered(values[b * count + j]);
    double before = 0;
    for (int64_t i = threadIdx.x; i < count; i += kThreads) {
      const double other = ordered(values[b * count + i]);
      before += other > mine || (other == mine && i < j);
    }
    const int64_t place = static_cast<int64_t>(block_reduce(before, Sum()));
    if (threadIdx.x == 0 && place < keep) out[b * keep + place] = static_cast<int>(j);
  }
};

template <class T>
struct SubtractRitz {
  View<const T> v;
  View<const double> lambda;
  const int* which;
  View<T> r;
  __device__ void operator()(int64_t b, int64_t j) const {
    const int64_t from = which[b * r.cols + j];
    const T* const source = v.column(b, from);
    const T value = static_cast<T>(lambda.column(b, 0)[from]);
    T* const target = r.column(b, j);
    for (int64_t i = threadIdx.x; i < r.rows; i += kThreads) target[i] -= source[i] * value;
  }
};

struct RitzValues {
  View<const double> lambda;
  const int* which;
  View<double> out;
  __device__ void operator()(int64_t b, int64_t) const {
    for (int64_t j = threadIdx.x; j < out.cols; j += kThreads) {
      out.column(b, 0)[j] = sqrt(lambda.column(b, 0)[which[b * out.cols + j]]);
    }
  }
};

struct RelativeSize {
  RitzSizes in;
  View<const double> lambda;
  double* out;
  __device__ void operator()(int64_t b, int64_t) const {
    const double noise = in.level * in.frobenius[b], floor = in.floor * sqrt(lambda.column(b, 0)[0]);
    double worst = in.failed[b] ? NAN : 0;
    for (int64_t j = threadIdx.x; j < in.count; j += kThreads) {
      const int which = in.which[b * in.count + j];
      const double size = in.sizes[b * in.count + j], value = sqrt(lambda.column(b, 0)[which]);
      const bool ignored = which >= in.rank || size <= noise * fmax(value, noise);
      if (!ignored) worst = Largest()(size / fmax(value * fmax(value, floor), 1e-300), worst);
    }
    worst = block_reduce(worst, Largest());
    if (threadIdx.x == 0) out[b] = worst;
  }
};

// -- the answer -------------------------------------------------------------------------------------------------------

template <class T, class Out>
struct FinishTriplet {
  Triplets in;
  View<const T> u, v;
  View<Out> out_u, out_v, out_s;
  double* stored;
  __device__ void operator()(int64_t b, int64_t j) const {
    const int64_t r = u.cols, from = in.order[b * r + j];
    const T* const left = u.column(b, from);
    const T* const right = v.column(b, from);
    double largest = 0;
    for (int64_t i = threadIdx.x; i < u.rows; i += kThreads) {
      largest = Largest()(fabs(static_cast<double>(left[i])), largest);
    }
    largest = block_reduce(largest, Largest());
    double first = static_cast<double>(u.rows);  // the row of the first one; none if there is a NaN
    for (int64_t i = threadIdx.x; i < u.rows; i += kThreads) {
      if (fabs(static_cast<double>(left[i])) == largest) first = Smallest()(static_cast<double>(i), first);
    }
    const int64_t row = static_cast<int64_t>(block_reduce(first, Smallest()));
    const T sign = row < u.rows && left[row] < 0 ? T(-1) : T(1);
    for (int64_t i = threadIdx.x; i < u.rows; i += kThreads) out_u.column(b, j)[i] = static_cast<Out>(sign * left[i]);
    for (int64_t i = threadIdx.x; i < v.rows; i += kThreads) out_v.column(b, j)[i] = static_cast<Out>(sign * right[i]);
    if (threadIdx.x != 0) return;
    const Out s = static_cast<Out>(ldexp(in.s[b * r + from], in.exponents[b]));
    out_s.column(b, 0)[j] = s;
    stored[b * r + j] = ldexp(static_cast<double>(s), -in.exponents[b]);
  }
};

template <class T>
struct ResidualNorm {
  View<const double> product;
  View<const T> v;
  const double* stored;
  double* out;
  __device__ void operator()(int64_t b, int64_t j) const {
    const double* const left = product.column(b, j);
    const T* const right = v.column(b, j);
    const double s = stored[b * v.cols + j];
    double squares = 0;
    for (int64_t i = threadIdx.x; i < v.rows; i += kThreads) {
      const double difference = left[i] - right[i] * s;
      squares += difference * difference;
    }
    squares = block_reduce(squares, Sum());
    if (threadIdx.x == 0) out[b * v.cols + j] = sqrt(squares);
  }
};

struct PackReport {
  Report in;
  double* out;
  __device__ void operator()(int64_t b, int64_t) const {
    double smallest = INFINITY;
    double* const row = out + b * (kSizes + 2 * in.r);
    for (int64_t j = threadIdx.x; j < in.r; j += kThreads) {
      smallest = Smallest()(in.values[b * in.r + j], smallest);
      row[kSizes + j] = in.sizes[b * in.r + j];
      row[kSizes + in.r + j] = in.stored[b * in.r + j];
    }
    smallest = block_reduce(smallest, Smallest());
    if (threadIdx.x != 0) return;
    row[kDefect] = Largest()(in.defect_u[b], in.defect_v[b]);
    row[kSmallest] = smallest;
    row[kSeen] = in.seen ? in.seen[b] : 0;
    row[kFailed] = in.failed[b];
    row[kExponent] = in.exponents[b];
  }
};

}  // namespace

void shift_gram(const Matrices& gram, double shift, const Matrices& identity, Stream stream) {
  for_columns(ShiftGram{View<double>(gram), shift, View<double>(identity)}, gram.cols, gram.batch, stream);
}

void usable_inverse(const Matrices& factor, const Matrices& inverse, const int* info, double least, int* failed,
                    const Matrices& out, Stream stream) {
  const View<const double> lower(factor), solved(inverse);
  with_type(out.type, [&](auto type) {
    using T = decltype(type);
    for_columns(UsableInverse<T>{lower, solved, info, least, failed, View<T>(out)}, out.cols, out.batch, stream);
  });
}

void descending_eigenpairs(const double* w, const Matrices& vectors, const int* info, const Matrices& lambda,
                           const Matrices& q, double* sigma, int* failed, Stream stream) {
  for_columns(Descending{w, View<const double>(vectors), info, View<double>(lambda), View<double>(q), sigma, failed},
              q.cols, q.batch, stream);
}

void mark_failures(const int* info, int64_t batch, int* failed, Stream stream) {
  for_columns(MarkFailures{info, batch, failed}, ceil_div(batch, kThreads), 1, stream);
}

void gram_defects(const Matrices& gram, double* out, Stream stream) {
  for_columns(Defect{View<const double>(gram), out}, 1, gram.batch, stream);
}

void longest_tails(const Matrices& q, int64_t block, int64_t count, double* tails, int* out, Stream stream) {
  for_columns(LongestTails{View<const double>(q), block, count, tails, out}, 1, q.batch, stream);
}

void largest_first(const double* values, int64_t count, int64_t keep, int64_t batch, int* out, Stream stream) {
  for_columns(LargestFirst{values, count, keep, out}, count, batch, stream);
}

void subtract_ritz(const Matrices& v, const Matrices& lambda, const int* which, const Matrices& r, Stream stream) {
  with_type(r.type, [&](auto type) {
    using T = decltype(type);
    for_columns(SubtractRitz<T>{View<const T>(v), View<const double>(lambda), which, View<T>(r)}, r.cols, r.batch,
                stream);
  });
}

void ritz_values(const Matrices& lambda, const int* which, const Matrices& out, Stream stream) {
  for_columns(RitzValues{View<const double>(lambda), which, View<double>(out)}, 1, out.batch, stream);
}

void relative_sizes(const RitzSizes& input, const Matrices& lambda, double* out, Stream stream) {
  for_columns(RelativeSize{input, View<const double>(lambda), out}, 1, lambda.batch, stream);
}

void finish_triplets(const Triplets& in, const Matrices& out_u, const Matrices& out_v, const Matrices& out_s,
                     double* stored, Stream stream) {
  with_type(in.u.type, [&](auto work) {
    using T = decltype(work);
    const View<const T> u(in.u), v(in.v);
    const auto run = [&](auto rounded) {
      using Out = decltype(rounded);
      for_columns(FinishTriplet<T, Out>{in, u, v, View<Out>(out_u), View<Out>(out_v), View<Out>(out_s), stored}, u.cols,
                  in.u.batch, stream);
    };
    if (sizeof(T) == 8 && out_u.type == Type::kFloat64) return run(double());
    run(float());
  });
}

void residual_norms(const Matrices& product, const Matrices& v, const double* stored, double* out, Stream stream) {
  with_type(v.type, [&](auto type) {
    using T = decltype(type);
    for_columns(ResidualNorm<T>{View<const double>(product), View<const T>(v), stored, out}, v.cols, v.batch, stream);
  });
}

void pack_report(const Report& input, double* out, Stream stream) {
  for_columns(PackReport{input, out}, 1, input.batch, stream);
}

}  // namespace osora::cuda
