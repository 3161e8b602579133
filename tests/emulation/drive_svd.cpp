// SPDX-License-Identifier: Apache-2.0
// Runs the kernels of csrc/cuda/svd/svd_*.cu on the CPU against float64, over sizes and types. The last line is a hash
// of all output bits: equal in every schedule (OSORA_EMULATION_ORDER).
#include "drive_svd.h"

#include <algorithm>
#include <vector>

#include "core/philox.h"

namespace osora::driver {
namespace {

void weights(Type type, Type to, int64_t d, int64_t k, double size) {
  const int64_t batch = 3, ld = (k + 7) / 8 * 8;
  std::vector<Array> w;
  const void* addresses[batch];
  for (int64_t b = 0; b < batch; ++b) {
    w.emplace_back(type, k, d);  // row-major [d, k]
    w[b].normal(size);
  }
  w[1].fill([](int64_t, int64_t, int64_t) { return 0; });
  for (int64_t b = 0; b < batch; ++b) addresses[b] = w[b].matrices().data;
  const Array partial = vector_of(Type::kFloat64, weight_partials(d), batch),
              norms = vector_of(Type::kFloat64, 1, batch);
  const Array exponents = vector_of(Type::kInt32, 1, batch), out(to, ld, d, batch);
  const Sources sources{addresses, type, d, k, batch};
  weight_exponents(sources, partial.doubles(), exponents.ints(), nullptr);
  scale_weights(sources, exponents.ints(), partial.doubles(), out.matrices(), norms.doubles(), nullptr);
  for (int64_t b = 0; b < batch; ++b) {
    double largest = 0, squares = 0;
    for (int64_t i = 0; i < d; ++i)
      for (int64_t j = 0; j < k; ++j) largest = std::max(largest, std::fabs(w[b].get(0, j, i)));
    int exponent = 0;
    if (largest > 0) std::frexp(largest, &exponent);
    bool exact = exponents.ints()[b] == exponent;
    for (int64_t i = 0; i < d; ++i) {
      for (int64_t j = 0; j < ld; ++j) {
        const double wish = j < k ? std::ldexp(w[b].get(0, j, i), -exponent) : 0;
        exact = exact && out.get(b, j, i) == wish;
        squares += wish * wish;
      }
    }
    expect(exact, "scaled weights");
    expect(near(norms.doubles()[b], std::sqrt(squares), 1e-13 * std::sqrt(squares)), "Frobenius norm");
  }
  out.count(), norms.count();
}

void moves(int64_t rows, int64_t cols) {
  const int64_t batch = 2;
  for (const Type from : {Type::kFloat64, Type::kFloat32, Type::kInt32, Type::kInt64}) {
    for (const Type to : {Type::kFloat64, Type::kFloat32, from}) {
      const bool numbers = from == Type::kFloat64 || from == Type::kFloat32;
      if (!numbers && to != from) continue;
      const Array source(from, rows, cols, batch, 3), out(to, rows, cols, batch, 5);
      source.normal(numbers ? 1 : 1e6);
      copy(source.matrices(), out.matrices(), nullptr);
      expect(out.all([&](int64_t b, int64_t i, int64_t j) {
        const double x = source.get(b, i, j);
        return out.get(b, i, j) == (to == Type::kFloat32 ? static_cast<double>(static_cast<float>(x)) : x);
      }),
             "copy");
    }
  }
  const Array half(Type::kBFloat16, rows, cols, batch, 3), wide(Type::kFloat64, rows, cols, batch);
  half.normal();
  copy(half.matrices(), wide.matrices(), nullptr);
  expect(wide.count().all([&](int64_t b, int64_t i, int64_t j) { return wide.get(b, i, j) == half.get(b, i, j); }),
         "copy of bfloat16");
  for (const Type type : kWork) {
    const Array from(type, rows, cols, batch, 1), out(type, rows, 3, batch), which = vector_of(Type::kInt32, 3, batch);
    from.normal();
    which.fill([&](int64_t b, int64_t, int64_t j) { return static_cast<double>((7 * j + b) % cols); });
    gather_columns(from.matrices(), which.ints(), out.matrices(), nullptr);
    expect(out.count().all([&](int64_t b, int64_t i, int64_t j) {
      return out.get(b, i, j) == from.get(b, i, which.ints()[b * 3 + j]);
    }),
           "gather");
  }
  const Array x(Type::kFloat32, rows, cols, batch, 2);
  x.normal();
  const int64_t ld = rows + 5;
  for (const int terms : {1, 2, 3}) {
    const Array split(Type::kBFloat16, ld, terms * cols, batch), wider(Type::kFloat32, ld, terms * cols, batch);
    split_terms(x.matrices(), nullptr, terms, split.matrices(), nullptr);
    bool padded = true, right = true;
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t j = 0; j < cols; ++j) {
        for (int64_t i = 0; i < ld; ++i) {
          double sum = 0;
          for (int t = 0; t < terms; ++t) sum += split.get(b, i, t * cols + j);
          if (i >= rows) padded = padded && sum == 0;
          if (i < rows) right = right && near(sum, x.get(b, i, j), std::ldexp(std::fabs(x.get(b, i, j)), -8 * terms));
        }
      }
    }
    expect(padded && right, "terms");
    if (terms == 1) continue;
    wider.fill([&](int64_t b, int64_t i, int64_t j) { return split.get(b, i, j); });
    const Array sum(Type::kFloat32, ld, cols, batch, 1);
    sum_terms(wider.matrices(), terms, sum.matrices(), nullptr);
    expect(sum.all([&](int64_t b, int64_t i, int64_t j) {
      return i >= rows ||
             near(sum.get(b, i, j), x.get(b, i, j), std::ldexp(std::fabs(x.get(b, i, j)), terms == 3 ? -24 : -16));
    }),
           "sum of terms");
    const Array again(Type::kFloat32, ld, cols, batch), lengths = vector_of(Type::kFloat64, cols, batch);
    const Array next(Type::kBFloat16, ld + 3, terms * cols, batch), wish(Type::kBFloat16, ld + 3, terms * cols, batch);
    sum_and_split_terms(wider.matrices(), terms, again.matrices(), next.matrices(), lengths.doubles(), nullptr);
    split_terms(sum.matrices(), nullptr, terms, wish.matrices(), nullptr);
    expect(again.all([&](int64_t b, int64_t i, int64_t j) {
      return again.get(b, i, j) == sum.get(b, i, j);
    }) && next.all([&](int64_t b, int64_t i, int64_t j) {
      return next.get(b, i, j) == wish.get(b, i, j);
    }) && lengths.all([&](int64_t b, int64_t, int64_t j) { return near(lengths.get(b, 0, j), sum.norm(b, j), 1e-9); }),
           "sum of terms, split again");
    split.count(), wider.count(), next.count(), lengths.count();
    const Array some = vector_of(Type::kInt32, 2, batch), chosen(Type::kBFloat16, ld, terms * 2, batch);
    some.fill([&](int64_t b, int64_t, int64_t j) { return static_cast<double>((5 * j + b) % cols); });
    split_terms(x.matrices(), some.ints(), terms, chosen.matrices(), nullptr);
    expect(chosen.all([&](int64_t b, int64_t i, int64_t j) {
      return chosen.get(b, i, j) == split.get(b, i, j / 2 * cols + some.ints()[b * 2 + j % 2]);
    }),
           "terms of chosen columns");
  }
}

void words(int64_t count) {
  std::vector<uint64_t> host(count);
  for (auto& word : host) word = generator();
  const Array out = vector_of(Type::kInt64, count);
  store_words(host.data(), count, out.as<uint64_t>(), nullptr);
  expect(std::equal(host.begin(), host.end(), out.as<uint64_t>()), "words");
  const Matrices matrices{out.matrices().data, Type::kFloat32, 1, 1, count, 3};
  const Array addresses = vector_of(Type::kInt64, count);
  matrix_addresses(matrices, addresses.as<void*>(), nullptr);
  bool right = true;
  for (int64_t b = 0; b < count; ++b) right = right && addresses.as<void*>()[b] == matrices.at(b);
  expect(right, "addresses");
}

void columns(Type type, int64_t rows, int64_t cols) {
  const int64_t batch = 2;
  const double unit = type == Type::kFloat64 ? 1e-14 : 1e-6;
  const Array keys = vector_of(Type::kInt64, 1, batch), out(type, rows, cols, batch, 1);
  keys.as<uint64_t>()[0] = core::mixed_key(5, 7);
  keys.as<uint64_t>()[1] = core::mixed_key(5, 8);
  const Random random{keys.as<uint64_t>(), 3};
  fill_normal(out.matrices(), random, nullptr);
  std::vector<double> wish(rows * cols);
  for (int64_t b = 0; b < batch; ++b) {
    core::fill_gaussian(wish.data(), rows * cols, 5, static_cast<uint64_t>(7 + b), 3);
    bool same = true;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        const double x = wish[i * cols + j];
        same = same && out.get(b, i, j) == (type == Type::kFloat64 ? x : static_cast<double>(static_cast<float>(x)));
      }
    }
    expect(same, "the numbers of core/philox.h");
  }
  const Array norms = vector_of(Type::kFloat64, cols, batch), lengths = vector_of(Type::kFloat64, cols, batch);
  column_norms(out.matrices(), norms.doubles(), nullptr);
  expect(norms.all([&](int64_t b, int64_t, int64_t j) { return near(norms.get(b, 0, j), out.norm(b, j), 1e-12); }),
         "column norms");

  // A column per kind of noise, as far as there are columns.
  const Array scale = vector_of(Type::kFloat64, 1, batch), seen = vector_of(Type::kFloat64, cols, batch);
  scale.fill([](int64_t, int64_t, int64_t) { return 2; });
  seen.fill([](int64_t, int64_t, int64_t j) { return j == 1 ? 3 : 0.5; });
  for (const bool by_norms : {false, true}) {
    const Array z(type, rows, cols, batch, 4);
    z.normal();
    const double level = 0.25, limit = by_norms ? level * 3 * level * 3 : level * 2;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        if (j == 1) z.set(0, i, j, 0);
        if (j == 2) z.set(1, i, j, NAN);
        if (j == 3) z.set(1, i, j, 0.9 * limit / std::sqrt(static_cast<double>(rows)));
        if (j == 4) z.set(1, i, j, 1.1 * limit / std::sqrt(static_cast<double>(rows)));
        if (j == 5 && i == 0) z.set(1, i, j, INFINITY);
      }
    }
    const Array before(type, rows, cols, batch);
    before.fill([&](int64_t b, int64_t i, int64_t j) { return z.get(b, i, j); });
    unit_columns(z.matrices(), {level, scale.doubles(), by_norms ? seen.doubles() : nullptr}, random, lengths.doubles(),
                 nullptr);
    bool unit_length = true, direction = true, told = true;
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t j = 0; j < cols; ++j) {
        const double length = before.norm(b, j);
        told =
            told && (std::isnan(length) ? std::isnan(lengths.get(b, 0, j))
                                        : length == lengths.get(b, 0, j) || near(lengths.get(b, 0, j), length, 1e-12));
        unit_length = unit_length && near(z.norm(b, j), 1, 10 * unit);
        const bool noise = !(length > limit && length < INFINITY);
        for (int64_t i = 0; i < rows; ++i) {
          const double from = noise ? out.get(b, i, j) / out.norm(b, j) : before.get(b, i, j) / length;
          direction = direction && near(z.get(b, i, j), from, unit);
        }
      }
    }
    expect(told && unit_length && direction, "unit columns");
    z.count(), lengths.count();
  }
  const Array z(type, rows, cols, batch);
  z.fill([](int64_t, int64_t, int64_t) { return 1e-30; });
  unit_columns(z.matrices(), {}, random, nullptr, nullptr);
  expect(near(z.get(0, 0, 0), 1 / std::sqrt(static_cast<double>(rows)), unit), "unit columns, no noise");
}

void factors(int64_t n) {
  const int64_t batch = 3;
  const Array gram(Type::kFloat64, n, n, batch), identity(Type::kFloat64, n, n, batch),
      before(Type::kFloat64, n, n, batch);
  gram.normal();
  before.fill([&](int64_t b, int64_t i, int64_t j) { return gram.get(b, i, j); });
  shift_gram(gram.matrices(), 0.5, identity.matrices(), nullptr);
  expect(gram.all([&](int64_t b, int64_t i, int64_t j) {
    return gram.get(b, i, j) == before.get(b, i, j) + (i == j ? 0.5 : 0) && identity.get(b, i, j) == (i == j);
  }),
         "shift");
  const Array info = vector_of(Type::kInt32, 1, batch), failed = vector_of(Type::kInt32, 1, batch);
  info.ints()[0] = 0, info.ints()[1] = 2, info.ints()[2] = 0;
  for (const Type type : kWork) {
    failed.fill([](int64_t, int64_t, int64_t) { return 0; });
    const Array out(type, n, n, batch);
    usable_inverse(gram.matrices(), before.matrices(), info.ints(), 0.4, failed.ints(), out.matrices(), nullptr);
    expect(out.count().all([&](int64_t b, int64_t i, int64_t j) {
      const bool good = b != 1 && gram.get(b, i, i) > 0.4;
      const double x = before.get(b, i, j);
      return out.get(b, i, j) == (good ? type == Type::kFloat64 ? x : static_cast<double>(static_cast<float>(x)) : 0);
    }),
           "usable inverse");
    expect(failed.ints()[0] == 0 && failed.ints()[1] == 1 && failed.ints()[2] == 0, "failed factor");
  }
  failed.fill([](int64_t, int64_t, int64_t) { return 0; });
  mark_failures(info.ints(), batch, failed.ints(), nullptr);
  expect(failed.ints()[0] == 0 && failed.ints()[1] == 1 && failed.ints()[2] == 0, "failures");

  const Array w = vector_of(Type::kFloat64, n, batch), lambda = vector_of(Type::kFloat64, n, batch);
  const Array q(Type::kFloat64, n, n, batch), sigma = vector_of(Type::kFloat64, 1, batch);
  w.fill([&](int64_t b, int64_t, int64_t j) { return b == 2 && j == n - 1 ? NAN : static_cast<double>(j) - 1.5; });
  failed.fill([](int64_t, int64_t, int64_t) { return 0; });
  descending_eigenpairs(w.doubles(), gram.matrices(), info.ints(), lambda.matrices(), q.matrices(), sigma.doubles(),
                        failed.ints(), nullptr);
  expect(failed.ints()[0] == 0 && failed.ints()[1] == 1 && failed.ints()[2] == 1, "failed eigenpairs");
  expect(q.all([&](int64_t b, int64_t i, int64_t j) {
    return q.get(b, i, j) == (b ? 0 : gram.get(b, i, n - 1 - j));
  }) && lambda.all([&](int64_t b, int64_t, int64_t j) {
    return lambda.get(b, 0, j) == (b ? 0 : std::max(0.0, static_cast<double>(n - 1 - j) - 1.5));
  }) && sigma.get(0, 0, 0) == std::sqrt(lambda.get(0, 0, 0)) &&
             sigma.get(1, 0, 0) == 0,
         "descending eigenpairs");

  const Array defects = vector_of(Type::kFloat64, 1, batch);
  gram.set(1, n / 2, n - 1, NAN);
  gram_defects(gram.matrices(), defects.doubles(), nullptr);
  double largest = 0;
  for (int64_t j = 0; j < n; ++j)
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(gram.get(0, i, j) - (i == j)));
  expect(defects.get(0, 0, 0) == largest && std::isnan(defects.get(1, 0, 0)), "defects");
  q.count(), lambda.count(), sigma.count(), defects.count();
}

void ritz(int64_t n, int64_t block, int64_t rank) {
  const int64_t batch = 2, count = std::max(rank, block), rows = 37;
  const Array q(Type::kFloat64, n, n, batch), tail = vector_of(Type::kFloat64, count, batch);
  q.normal();
  for (int64_t i = 0; i < n && count > 2; ++i) q.set(1, i, 2, q.get(1, i, 0));  // a tie
  q.set(0, n - 1, 1, NAN);                                                      // comes first
  const Array which = vector_of(Type::kInt32, block, batch), by_value = vector_of(Type::kInt32, block, batch);
  longest_tails(q.matrices(), block, count, tail.doubles(), which.ints(), nullptr);
  largest_first(tail.doubles(), count, block, batch, by_value.ints(), nullptr);
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<double> squares(count);
    std::vector<int> order(count);
    for (int64_t j = 0; j < count; ++j) {
      order[j] = static_cast<int>(j);
      for (int64_t i = n - block; i < n; ++i) squares[j] = std::fma(q.get(b, i, j), q.get(b, i, j), squares[j]);
      if (std::isnan(squares[j])) squares[j] = INFINITY;
    }
    std::stable_sort(order.begin(), order.end(), [&](int x, int y) { return squares[x] > squares[y]; });
    expect(std::equal(order.begin(), order.begin() + block, which.ints() + b * block), "longest tails");
    expect(std::equal(order.begin(), order.begin() + block, by_value.ints() + b * block), "largest first");
  }
  const Array lambda = vector_of(Type::kFloat64, n, batch), values = vector_of(Type::kFloat64, block, batch);
  lambda.fill([&](int64_t, int64_t, int64_t j) { return 1.0 / static_cast<double>(1 + j * j); });
  ritz_values(lambda.matrices(), which.ints(), values.matrices(), nullptr);
  expect(values.all([&](int64_t b, int64_t, int64_t j) {
    return values.get(b, 0, j) == std::sqrt(lambda.get(b, 0, which.ints()[b * block + j]));
  }),
         "Ritz values");
  for (const Type type : kWork) {
    const Array v(type, rows, n, batch), r(type, rows, block, batch), before(type, rows, block, batch);
    v.normal(), r.normal();
    before.fill([&](int64_t b, int64_t i, int64_t j) { return r.get(b, i, j); });
    subtract_ritz(v.matrices(), lambda.matrices(), which.ints(), r.matrices(), nullptr);
    expect(r.count().all([&](int64_t b, int64_t i, int64_t j) {
      const int64_t from = which.ints()[b * block + j];
      return near(r.get(b, i, j), before.get(b, i, j) - v.get(b, i, from) * lambda.get(b, 0, from), 1e-6);
    }),
           "Ritz residuals");
  }
  const Array sizes = vector_of(Type::kFloat64, block, batch), frobenius = vector_of(Type::kFloat64, 1, batch);
  const Array failed = vector_of(Type::kInt32, 1, batch), worst = vector_of(Type::kFloat64, 1, batch);
  sizes.fill([](int64_t, int64_t, int64_t j) { return 0.01 * static_cast<double>(j % 5 + 1); });
  frobenius.fill([](int64_t, int64_t, int64_t) { return 2; });
  failed.fill([](int64_t b, int64_t, int64_t) { return static_cast<double>(b); });
  const double level = 0.02, noise = 2 * level, floor = 0.2;  // of sigma_1 = 1
  relative_sizes({sizes.doubles(), which.ints(), block, rank, level, floor, frobenius.doubles(), failed.ints()},
                 lambda.matrices(), worst.doubles(), nullptr);
  double wish = 0;
  for (int64_t j = 0; j < block; ++j) {
    const int from = which.ints()[j];
    const double size = sizes.get(0, 0, j), value = std::sqrt(lambda.get(0, 0, from));
    if (from >= rank || size <= noise * std::max(value, noise)) continue;
    wish = std::max(wish, size / (value * std::max(value, floor)));
  }
  expect(worst.get(0, 0, 0) == wish && std::isnan(worst.get(1, 0, 0)), "relative sizes");
  const Array raised = vector_of(Type::kFloat64, 1, batch);
  raised.fill([](int64_t b, int64_t, int64_t) { return b == 0 ? 0.0 : 7.0; });
  raise_to_largest(sizes.doubles(), block, batch, raised.doubles(), nullptr);
  double largest = 0;
  for (int64_t j = 0; j < block; ++j) largest = std::max(largest, sizes.get(0, 0, j));
  expect(raised.get(0, 0, 0) == largest && raised.get(1, 0, 0) == 7, "raised to the largest");
  which.count(), values.count();
}

void answer(Type work, Type to, int64_t d, int64_t k, int64_t r) {
  const int64_t batch = 2;
  const Array u(work, d, r, batch), v(work, k, r, batch), s = vector_of(Type::kFloat64, r, batch);
  const Array order = vector_of(Type::kInt32, r, batch), exponents = vector_of(Type::kInt32, 1, batch);
  u.normal(), v.normal();
  for (int64_t i = 0; i < d; ++i) u.set(0, i, 0, i % 2 ? 1 : -1);  // all equal: the first one decides
  u.set(1, d - 1, r - 1, NAN);
  s.fill([](int64_t, int64_t, int64_t j) { return 1.0 / static_cast<double>(j + 1) + 1e-9; });
  order.fill([&](int64_t, int64_t, int64_t j) { return static_cast<double>(r - 1 - j); });
  exponents.ints()[0] = 5, exponents.ints()[1] = -140;  // subnormal in float32
  const Array out_u(to, d, r, batch), out_v(to, k, r, batch), out_s(to, 1, r, batch);
  const Array stored = vector_of(Type::kFloat64, r, batch);
  finish_triplets({u.matrices(), v.matrices(), s.doubles(), order.ints(), exponents.ints()}, out_u.matrices(),
                  out_v.matrices(), out_s.matrices(), stored.doubles(), nullptr);
  bool right = true;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t j = 0; j < r; ++j) {
      const int64_t from = r - 1 - j;
      double largest = 0, sign = 1;
      for (int64_t i = 0; i < d; ++i) {
        const double x = u.get(b, i, from);
        if (std::fabs(x) > largest) largest = std::fabs(x), sign = x < 0 ? -1 : 1;
        if (std::isnan(x)) largest = INFINITY, sign = 1;
      }
      const auto rounded = [&](double x) {
        return to == Type::kFloat64 ? x : static_cast<double>(static_cast<float>(x));
      };
      const auto same = [&](double x, double y) { return x == y || (std::isnan(x) && std::isnan(y)); };
      for (int64_t i = 0; i < d; ++i) right = right && same(out_u.get(b, i, j), rounded(sign * u.get(b, i, from)));
      for (int64_t i = 0; i < k; ++i) right = right && same(out_v.get(b, i, j), rounded(sign * v.get(b, i, from)));
      const double value = rounded(std::ldexp(s.get(b, 0, from), exponents.ints()[b]));
      right = right && out_s.get(b, 0, j) == value && stored.get(b, 0, j) == std::ldexp(value, -exponents.ints()[b]);
    }
  }
  expect(right, "triplets");

  const Array product(Type::kFloat64, k, r, batch), residuals = vector_of(Type::kFloat64, r, batch);
  product.normal();
  residual_norms(product.matrices(), out_v.matrices(), stored.doubles(), residuals.doubles(), nullptr);
  expect(residuals.all([&](int64_t b, int64_t, int64_t j) {
    double sum = 0;
    for (int64_t i = 0; i < k; ++i) {
      const double x = product.get(b, i, j) - out_v.get(b, i, j) * stored.get(b, 0, j);
      sum += x * x;
    }
    return near(residuals.get(b, 0, j), std::sqrt(sum), 1e-12);
  }),
         "residuals");

  const Array one = vector_of(Type::kFloat64, 1, batch), two = vector_of(Type::kFloat64, 1, batch);
  const Array failed = vector_of(Type::kInt32, 1, batch);
  one.fill([](int64_t, int64_t, int64_t) { return 1; }), two.fill([](int64_t, int64_t, int64_t) { return 2; });
  failed.fill([](int64_t b, int64_t, int64_t) { return static_cast<double>(b); });
  for (const double* seen : {static_cast<const double*>(nullptr), static_cast<const double*>(two.doubles())}) {
    const Array report = vector_of(Type::kFloat64, kSizes + 2 * r, batch);
    pack_report({residuals.doubles(), stored.doubles(), s.doubles(), r, batch, one.doubles(), two.doubles(), seen,
                 failed.ints(), exponents.ints()},
                report.doubles(), nullptr);
    bool good = true;
    for (int64_t b = 0; b < batch; ++b) {
      good = good && report.get(b, 0, kDefect) == 2 && report.get(b, 0, kSmallest) == s.get(b, 0, r - 1) &&
             report.get(b, 0, kSeen) == (seen ? 2 : 0) && report.get(b, 0, kFailed) == static_cast<double>(b) &&
             report.get(b, 0, kExponent) == exponents.ints()[b];
      for (int64_t j = 0; j < r; ++j) {
        good = good && report.get(b, 0, kSizes + j) == residuals.get(b, 0, j) &&
               report.get(b, 0, kSizes + r + j) == stored.get(b, 0, j);
      }
    }
    expect(good, "report");
    report.count();
  }
  out_u.count(), out_v.count(), out_s.count();
}

}  // namespace
}  // namespace osora::driver

int main() {
  using namespace osora::driver;
  struct Size {
    int64_t d, k;
  };
  for (const auto [d, k] : {Size{1, 1}, {17, 5}, {33, 257}, {300, 3}, {16, 64}}) {
    for (const Type type : {Type::kFloat64, Type::kFloat32, Type::kBFloat16, Type::kFloat16}) {
      for (const double size : {1.0, type == Type::kFloat16 ? 1e-3 : 1e-30}) weights(type, Type::kFloat64, d, k, size);
      if (type != Type::kFloat64) weights(type, Type::kFloat32, d, k, 100);
    }
    weights(Type::kBFloat16, Type::kBFloat16, d, k, 1e30);
  }
  for (const auto [rows, cols] : {Size{1, 1}, {4096, 1}, {4097, 1}, {67, 7}, {257, 3}}) moves(rows, cols);
  for (const int64_t count : {1, 64, 65, 300}) words(count);
  for (const auto [rows, cols] : {Size{1, 1}, {2, 1}, {255, 6}, {257, 7}, {513, 9}}) {
    for (const Type type : kWork) columns(type, rows, cols);
  }
  for (const int64_t n : {2, 7, 259}) factors(n);
  ritz(11, 3, 5), ritz(40, 16, 8), ritz(280, 7, 260);
  for (const auto [d, k] : {Size{1, 1}, {5, 9}, {300, 257}}) {
    for (const int64_t r : {1, 4}) {
      for (const Type work : kWork) answer(work, Type::kFloat32, d, k, r);
      answer(Type::kFloat64, Type::kFloat64, d, k, r);
    }
  }
  answer(Type::kFloat32, Type::kFloat32, 20, 30, 300);
  fill_normal({nullptr, Type::kFloat32, 5, 0, 1, 0}, {nullptr, 0}, nullptr);  // nothing to do is done
  orthogonal();
  std::printf("%d checks, %d failures\nbits %016lx\n", checks, failures, static_cast<unsigned long>(all_bits));
  return failures != 0;
}
