// SPDX-License-Identifier: Apache-2.0
// Cholesky QR by strips against float64.
#include <algorithm>
#include <vector>

#include "core/philox.h"
#include "drive_svd.h"

namespace osora::driver {
namespace {

struct Scratch {
  Array parts, again = vector_of(Type::kInt32, 1, 3), keys = vector_of(Type::kInt64, 1, 3);
  explicit Scratch(const Matrices& z)
      : parts(vector_of(Type::kFloat64, row_strips(z.rows) * z.cols * z.cols, z.batch)) {
    for (int b = 0; b < 3; ++b) keys.as<uint64_t>()[b] = core::mixed_key(11, static_cast<uint64_t>(b));
  }
  CholeskyRound round() const { return {{}, {keys.as<uint64_t>(), 2}, 1e-13, 1e-6, nullptr, again.ints()}; }
  void run(const Matrices& z, const CholeskyRound& how) const {
    gram_parts(z, how.wanted, parts.doubles(), nullptr);
    solve_strips(z, parts.doubles(), how, nullptr);
  }
};

double dot(const Array& a, int64_t b, int64_t i, const Array& c, int64_t j) {
  double sum = 0;
  for (int64_t row = 0; row < a.matrices().rows; ++row) sum += a.get(b, row, i) * c.get(b, row, j);
  return sum;
}

Array copy_of(const Array& a) {
  const Matrices& m = a.matrices();
  Array made(m.type, m.rows, m.cols, m.batch);
  made.fill([&](int64_t b, int64_t i, int64_t j) { return a.get(b, i, j); });
  return made;
}

bool same(const Array& a, const Array& b, int64_t matrix) {
  return a.all([&](int64_t m, int64_t i, int64_t j) { return m != matrix || a.get(m, i, j) == b.get(m, i, j); });
}

void rounds(Type type, int64_t rows, int64_t cols) {
  const int64_t batch = 3;
  const double unit = type == Type::kFloat64 ? 1e-12 : 3e-7 * std::sqrt(static_cast<double>(rows));
  const Array z(type, rows, cols, batch, 5);
  const Scratch scratch(z.matrices());
  std::normal_distribution<double> draw;
  // Columns of very different lengths; those of matrix 1 lean on each other.
  z.fill([&](int64_t b, int64_t, int64_t j) {
    return std::ldexp(draw(generator) + (b == 1 ? 3 : 0), static_cast<int>(j % 5 * 10 - 20));
  });
  const Array before = copy_of(z);
  scratch.run(z.matrices(), scratch.round());
  const Array once = copy_of(z);
  // The shift counts as often as the Gram matrix's condition, some 10^4 for matrix 1.
  expect(z.count().all([&](int64_t b, int64_t, int64_t j) {
    return near(z.norm(b, j), 1, b == 1 ? std::max(unit, 1e-8) : unit);
  }),
         "unit length");
  bool orthogonal = true, span = true;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t j = 0; j < cols; ++j) {
      for (int64_t i = 0; i < j; ++i) orthogonal = orthogonal && near(dot(z, b, i, z, j), 0, b == 1 ? 1e-2 : unit * 30);
    }
    for (int64_t i = 0; i < rows; ++i)
      span = span && near(z.get(b, i, 0), before.get(b, i, 0) / before.norm(b, 0), unit);
  }
  expect(orthogonal, "orthogonal after one round");
  expect(span, "the first column keeps its direction");
  expect(scratch.again.ints()[0] == 1 || cols * rows == 1, "columns that were not orthonormal ask for another round");

  scratch.run(z.matrices(), scratch.round());
  for (int64_t b = 0; b < batch; ++b) {
    bool good = scratch.again.ints()[b] == 0;
    for (int64_t j = 0; j < cols; ++j) {
      for (int64_t i = 0; i <= j; ++i) good = good && near(dot(z, b, i, z, j), i == j, unit);
    }
    expect(good, "orthonormal after two rounds, and known to be");
  }
  const Array twice = copy_of(z);
  scratch.run(z.matrices(), scratch.round());
  expect(z.count().all([&](int64_t b, int64_t i, int64_t j) {
    return near(z.get(b, i, j), twice.get(b, i, j), type == Type::kFloat64 ? 1e-14 : 2e-7);
  }),
         "orthonormal columns stay as they are");

  // A column half as long as it was: not orthonormal any more.
  z.fill([&](int64_t b, int64_t i, int64_t j) { return twice.get(b, i, j) * (b == 2 && j == cols - 1 ? 0.5 : 1); });
  scratch.run(z.matrices(), scratch.round());
  expect(scratch.again.ints()[0] == 0 && scratch.again.ints()[2] == 1, "what lost half of a column asks for more");

  // Only what is wanted.
  const Array wanted = vector_of(Type::kInt32, 1, batch);
  wanted.fill([](int64_t b, int64_t, int64_t) { return b == 1; });
  z.fill([&](int64_t b, int64_t i, int64_t j) { return before.get(b, i, j); });
  const Array kept = copy_of(z);
  scratch.again.fill([](int64_t, int64_t, int64_t) { return 7; });
  CholeskyRound some = scratch.round();
  some.wanted = wanted.ints();
  scratch.run(z.matrices(), some);
  expect(same(z, kept, 0) && same(z, once, 1) && same(z, kept, 2) && scratch.again.ints()[0] == 7,
         "only what is wanted");
}

// Columns that are none: zero, NaN, infinite, below the noise; and one that others make up.
void bad_columns(Type type, int64_t rows) {
  const int64_t cols = 9, batch = 3;
  const double unit = type == Type::kFloat64 ? 1e-13 : 3e-7 * std::sqrt(static_cast<double>(rows));
  const Array z(type, rows, cols, batch, 1), norms = vector_of(Type::kFloat64, cols, batch);
  const Array scale = vector_of(Type::kFloat64, 1, batch), drawn(type, rows, cols, batch);
  const Scratch scratch(z.matrices());
  const Random random{scratch.keys.as<uint64_t>(), 2};
  fill_normal(drawn.matrices(), random, nullptr);
  z.normal();
  scale.fill([](int64_t, int64_t, int64_t) { return 2; });
  norms.fill([](int64_t, int64_t, int64_t j) { return j == 1 ? 3 : 0.5; });
  const double level = 0.25, limit = level * 3 * level * 3, long_enough = 1.1 * limit, short_by_little = 0.9 * limit;
  for (int64_t i = 0; i < rows; ++i) {
    z.set(0, i, 1, 0);
    z.set(0, i, 3, i == rows / 2 ? NAN : 1);
    z.set(0, i, 4, i == rows / 2 ? INFINITY : 1);
    const double root = std::sqrt(static_cast<double>(rows));
    z.set(1, i, 2, short_by_little / root * (i % 2 ? 1 : -1));
    z.set(1, i, 5, long_enough / root * (i % 3 ? 1 : -1));
    z.set(2, i, 7, z.get(2, i, 0) + z.get(2, i, 6));  // in the span of two others, to rounding
  }
  CholeskyRound how = scratch.round();
  how.noise = {level, scale.doubles(), norms.doubles()};
  scratch.run(z.matrices(), how);
  const auto replaced = [&](int64_t b, int64_t j) {
    bool right = true;
    for (int64_t i = 0; i < rows; ++i) {
      const double wish = drawn.get(b, i, j) / std::sqrt(static_cast<double>(rows));
      right = right && near(z.get(b, i, j), wish, unit);
    }
    return right;
  };
  expect(replaced(0, 1) && replaced(0, 3) && replaced(0, 4) && replaced(1, 2) && replaced(2, 7), "what is no column");
  expect(!replaced(1, 5) && !replaced(0, 0) && !replaced(2, 6), "what is one");
  for (int64_t b = 0; b < batch; ++b) {
    expect(scratch.again.ints()[b] == 1, "a new column asks for another round");
    bool finite = true, others = true;
    for (int64_t j = 0; j < cols; ++j) {
      finite = finite && std::isfinite(z.norm(b, j));
      for (int64_t i = 0; i < j; ++i) {
        const bool random_one = (b == 0 && (i == 1 || i == 3 || i == 4 || j == 1 || j == 3 || j == 4)) ||
                                (b == 1 && (i == 2 || j == 2)) || (b == 2 && (i == 7 || j == 7));
        others = others && (random_one || near(dot(z, b, i, z, j), 0, 30 * unit));
      }
    }
    expect(finite && others, "the others are orthonormal among themselves");
  }
  scratch.run(z.matrices(), scratch.round());
  scratch.run(z.matrices(), scratch.round());
  bool good = true;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t j = 0; j < cols; ++j) {
      for (int64_t i = 0; i <= j; ++i) good = good && near(dot(z, b, i, z, j), i == j, unit);
    }
  }
  z.count();
  expect(good, "orthonormal with the new columns");
}

void projections(Type type, int64_t rows, int64_t width, int64_t cols) {
  const int64_t batch = 3, strips = row_strips(rows);
  const Array v(type, rows, width, batch, 2), z(type, rows, cols, batch, 3), wanted = vector_of(Type::kInt32, 1, batch);
  const Array parts = vector_of(Type::kFloat64, strips * width * cols, batch);
  v.normal(), z.normal();
  wanted.fill([](int64_t b, int64_t, int64_t) { return b != 1; });
  const Array before = copy_of(z);
  inner_parts(v.matrices(), z.matrices(), wanted.ints(), parts.doubles(), nullptr);
  subtract_inside(v.matrices(), parts.doubles(), wanted.ints(), z.matrices(), nullptr);
  std::vector<double> inside(static_cast<size_t>(width));
  bool right = same(z, before, 1);
  for (const int64_t b : {int64_t{0}, int64_t{2}}) {
    for (int64_t j = 0; j < cols; ++j) {
      for (int64_t w = 0; w < width; ++w) inside[static_cast<size_t>(w)] = dot(v, b, w, before, j);
      for (int64_t i = 0; i < rows; ++i) {
        double wish = before.get(b, i, j), size = std::fabs(wish);
        for (int64_t w = 0; w < width; ++w) {
          wish -= v.get(b, i, w) * inside[static_cast<size_t>(w)];
          size += std::fabs(v.get(b, i, w) * inside[static_cast<size_t>(w)]);
        }
        right = right && near(z.get(b, i, j), wish, size * (type == Type::kFloat64 ? 1e-13 : 1e-6));
      }
    }
  }
  z.count();
  expect(right, "projection by strips");
}

}  // namespace

void orthogonal() {
  struct Size {
    int64_t rows, cols;
  };
  for (const Type type : kWork) {
    for (const auto [rows, cols] : {Size{1, 1}, {23, 5}, {256, 16}, {257, 17}, {300, 32}, {130, 63}, {520, 64}}) {
      rounds(type, rows, cols);
    }
    for (const int64_t rows : {40, 300}) bad_columns(type, rows);
    projections(type, 1, 1, 1), projections(type, 257, 17, 5), projections(type, 300, 33, 20);
    projections(type, 64, 5, 64);
  }
}

}  // namespace osora::driver
