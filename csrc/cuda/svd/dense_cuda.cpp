// SPDX-License-Identifier: Apache-2.0
// Storage and products.
#include "cuda/svd/dense_cuda.h"

#include <algorithm>

#include "core/philox.h"
#include "core/svd_verdict.h"

namespace osora::cuda {
namespace {

using core::Products;

core::WeightType weight_type(Type type) {
  switch (type) {
    case Type::kFloat64:
      return core::WeightType::kFloat64;
    case Type::kBFloat16:
      return core::WeightType::kBFloat16;
    case Type::kFloat16:
      return core::WeightType::kFloat16;
    default:
      return core::WeightType::kFloat32;
  }
}

Type stored_type(Products products) {
  if (products == Products::kFloat64) return Type::kFloat64;
  return products == Products::kBFloat16 ? Type::kBFloat16 : Type::kFloat32;
}

// Tensor cores want 16-byte columns.
int64_t padded(int64_t rows) { return (rows + 7) / 8 * 8; }

// call(first position in the list, first value, length) for each run of consecutive values.
template <class Call>
void for_runs(const std::vector<int64_t>& values, Call call) {
  const int64_t count = static_cast<int64_t>(values.size());
  for (int64_t begin = 0, end = 0; begin < count; begin = end) {
    end = begin + 1;
    while (end < count && values[end] == values[end - 1] + 1) ++end;
    call(begin, values[begin], end - begin);
  }
}

}  // namespace

DenseCuda::DenseCuda(Context& context, const std::vector<const void*>& weights, Type type, const core::SvdPlan& plan,
                     const DenseOptions& options, const std::vector<uint64_t>& keys)
    : context_(&context),
      plan_(plan),
      work_(options.float64_work || type == Type::kFloat64 ? Type::kFloat64 : Type::kFloat32),
      out_(type == Type::kFloat64 ? Type::kFloat64 : Type::kFloat32),
      iteration_(core::iteration_precision(weight_type(type), options.float64_work, options.tol, context.capability)),
      exact_(core::exact_precision(weight_type(type), options.float64_work, context.capability)),
      temporary_bytes_(options.temporary_bytes),
      d_(plan.transposed ? plan.cols : plan.rows),
      k_(plan.transposed ? plan.rows : plan.cols),
      floor_(core::rounding_floor(d_, k_, out_ == Type::kFloat64 ? 0x1p-52 : 0x1p-23)),
      noise_(core::rounding_noise(d_, k_, out_ == Type::kFloat64 ? 0x1p-52 : 0x1p-23)) {
  std::vector<uint64_t> addresses, mixed;
  for (size_t b = 0; b < weights.size(); ++b) {
    positions_.push_back(static_cast<int64_t>(b));
    addresses.push_back(reinterpret_cast<uintptr_t>(weights[b]));
    mixed.push_back(core::mixed_key(options.seed, keys[b]));
  }
  const Array sources = array(1, 1, Type::kInt64);
  store_words(addresses.data(), batch(), sources.as<uint64_t>(), stream());
  keys_ = array(1, 1, Type::kInt64);
  store_words(mixed.data(), batch(), keys_.as<uint64_t>(), stream());

  weights_ = array(padded(k_), d_, stored_type(exact_.products));
  exponents_ = array(1, 1, Type::kInt32);
  frobenius_ = array(1, 1, Type::kFloat64);
  const Array partial = array(1, weight_partials(d_), Type::kFloat64);
  const Sources from{sources.as<const void*>(), type, d_, k_, batch()};
  weight_exponents(from, partial.as<double>(), exponents_.as<int>(), stream());
  scale_weights(from, exponents_.as<int>(), partial.as<double>(), weights_, frobenius_.as<double>(), stream());

  failed_ = array(1, 1, Type::kInt32);
  sigma_ = zero_norms(1);
  check(cudaMemsetAsync(failed_.data, 0, batch() * sizeof(int), stream()), "cudaMemsetAsync");
}

DenseCuda::Array DenseCuda::array(int64_t rows, int64_t cols, Type type, int64_t batch) const {
  Array made;
  made.type = type;
  made.rows = rows;
  made.cols = cols;
  made.batch = batch;
  made.stride = rows * cols;
  made.owner = context_->memory->allocate(static_cast<size_t>(batch * made.stride * size_of(type)));
  made.data = made.owner.get();
  return made;
}

DenseCuda::Array DenseCuda::columns(const Array& a, int64_t begin, int64_t count) {
  Array part = a;
  part.data = a.at(0, begin);
  part.cols = count;
  return part;
}

void DenseCuda::copy(const Array& target, const Array& source) const {
  if (target.data != source.data) cuda::copy(source, target, stream());
}

DenseCuda::Array DenseCuda::clone(const Array& a) const {
  const Array made = array(a.rows, a.cols, a.type);
  copy(made, a);
  return made;
}

DenseCuda::Array DenseCuda::wide(const Matrices& a) const {
  if (a.type == Type::kFloat64) return {a, nullptr};
  const Array made = array(a.rows, a.cols, Type::kFloat64, a.batch);
  cuda::copy(a, made, stream());
  return made;
}

DenseCuda::Array DenseCuda::select(const Array& a, const std::vector<int64_t>& positions) const {
  const Array made = array(a.rows, a.cols, a.type, static_cast<int64_t>(positions.size()));
  for_runs(positions, [&](int64_t to, int64_t from, int64_t count) {
    cuda::copy(slice(a, from, count), slice(made, to, count), stream());
  });
  return made;
}

void DenseCuda::insert(const Array& target, int64_t b, const Array& source, int64_t from) const {
  const int64_t count = std::min(target.cols, source.cols);
  cuda::copy(slice(columns(source, 0, count), from, 1), slice(columns(target, 0, count), b, 1), stream());
}

DenseCuda DenseCuda::only(const std::vector<int64_t>& positions) const {
  DenseCuda fewer = *this;
  fewer.positions_.clear();
  for (const int64_t b : positions) fewer.positions_.push_back(positions_[b]);
  for (const auto number :
       {&DenseCuda::keys_, &DenseCuda::exponents_, &DenseCuda::frobenius_, &DenseCuda::failed_, &DenseCuda::sigma_}) {
    fewer.*number = select(this->*number, positions);
  }
  return fewer;
}

// y = A x, or A^T x where `back`, of x as the weight is stored: W^T, column by column.
void DenseCuda::multiply_stored(const Array& x, const Array& y, bool back, Gemm kind) const {
  const bool by_w = plan_.transposed == back;
  for_runs(positions_, [&](int64_t b, int64_t position, int64_t count) {
    gemm(*context_, {slice(weights_, position, count), by_w}, {slice(x, b, count)}, slice(y, b, count), by_w ? k_ : d_,
         1, 0, kind);
  });
}

DenseCuda::Array DenseCuda::split(const Array& x, int terms, const Array* which) const {
  const Array made = array(padded(x.rows), terms * (which ? which->cols : x.cols), Type::kBFloat16);
  split_terms(x, which ? which->as<int>() : nullptr, terms, made, stream());
  return made;
}

void DenseCuda::multiply_terms(const Array& terms, const Array& y, bool back, int count, const Array* next,
                               double* norms) const {
  if (count == 1) {
    multiply_stored(terms, y, back, Gemm::kAsIs);
    if (!next) return;
    split_terms(y, nullptr, count, *next, stream());
    return cuda::column_norms(y, norms, stream());
  }
  const Array products = array(y.rows, terms.cols, Type::kFloat32);
  multiply_stored(terms, products, back, Gemm::kAsIs);
  if (!next) return sum_terms(products, count, y, stream());
  sum_and_split_terms(products, count, y, *next, norms, stream());
}

void DenseCuda::multiply(const Array& x, const Array& y, bool back, const core::Precision& how, Gemm kind) const {
  if (how.products == Products::kTf32) kind = Gemm::kTf32;
  if (how.products != Products::kBFloat16) return multiply_stored(x, y, back, kind);
  multiply_terms(split(x, how.terms), y, back, how.terms);
}

DenseCuda::Array DenseCuda::transposed_times_exactly(const Array& y) const {
  const Array z = empty(plan_.cols, y.cols);
  multiply(y, z, /*back=*/true, exact_, Gemm::kPedantic);
  return z;
}

std::pair<DenseCuda::Array, DenseCuda::Array> DenseCuda::times_and_back(const Array& x, const Array& y,
                                                                        const Array& place) const {
  const int terms = iteration_.terms;
  if (iteration_.products != Products::kBFloat16) {
    times(x, y);
    multiply(y, place, /*back=*/true, iteration_);
    return {place, column_norms(y)};
  }
  const Array next = array(padded(y.rows), terms * y.cols, Type::kBFloat16), norms = array(1, y.cols, Type::kFloat64);
  multiply_terms(split(x, terms), y, /*back=*/false, terms, &next, norms.as<double>());
  multiply_terms(next, place, /*back=*/true, terms);
  return {place, norms};
}

DenseCuda::Array DenseCuda::product(const Array& x, const Array& q) const {
  const Array factor = empty(q.rows, q.cols), made = empty(x.rows, q.cols);
  copy(factor, q);
  gemm(*context_, {x}, {factor}, made, x.cols);
  return made;
}

void DenseCuda::project_out(const Array& z, const Array& v) const {
  const Array inside = empty(v.cols, z.cols);
  gemm(*context_, {v, true}, {z}, inside, v.rows);
  gemm(*context_, {v}, {inside}, z, v.cols, -1, 1);
}

void DenseCuda::rotate(const Array& v, const Array& y, const Array& q, int64_t width, int64_t keep) const {
  const Array factor = empty(width, keep);
  copy(factor, columns(q, 0, keep));
  for (const Array* const a : {&v, &y}) {
    const Array rotated = empty(a->rows, keep);
    gemm(*context_, {columns(*a, 0, width)}, {factor}, rotated, width);
    copy(columns(*a, 0, keep), rotated);
  }
}

// y^T y in float64, a part of the batch at a time: [c, c].
DenseCuda::Array DenseCuda::gram(const Array& y) const {
  const Array made = array(y.cols, y.cols, Type::kFloat64);
  const int64_t most = std::max<int64_t>(1, temporary_bytes_ / (8 * y.rows * y.cols));
  for (int64_t b = 0; b < batch(); b += most) {
    const int64_t count = std::min(most, batch() - b);
    const Array exact = wide(slice(y, b, count));
    gemm(*context_, {exact, true}, {exact}, slice(made, b, count), y.rows);
  }
  return made;
}

}  // namespace osora::cuda
