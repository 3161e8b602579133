// SPDX-License-Identifier: Apache-2.0
#include "torch/svd/panels.h"

#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "cpu/skinny.h"
#include "torch/common/guards.h"
#include "torch/common/numbers.h"
#include "torch/common/workers.h"
#include "torch/svd/rounding.h"
#include "torch/svd/scale.h"

namespace osora {
namespace {

// Up to here 2^-exponent is applied to the products and the weight is used as it is; beyond, squares of float32 numbers
// would leave their range.
constexpr int kMildExponent = 32;
constexpr int64_t kSkinny = 48;                      // columns up to which cpu/skinny.h is faster than BLAS
constexpr int64_t kCacheEntries = int64_t{1} << 18;  // of a panel in float32: half of a 2 MiB cache

int64_t panel_rows(int64_t k, bool skinny) {
  if (!skinny) return std::clamp<int64_t>(2 * kCacheEntries / std::max<int64_t>(k, 1), 64, 512);
  return std::clamp<int64_t>(kCacheEntries / std::max<int64_t>(k, 1) / 8 * 8, 8, 32);
}

// Groups of panels have a sum of A^T y each. Several per thread, so that a slow core does not hold up the others; and
// the sums are added in one order, whoever made them.
int64_t groups_for(int64_t panels, int64_t threads) {
  return threads == 1 ? 1 : std::min(panels, threads <= 8 ? 4 * threads : threads);
}

bool takes_skinny(at::ScalarType work, int64_t n) {
  return work == at::kFloat && n % 8 == 0 && n <= kSkinny && cpu::skinny() != nullptr;
}

// The largest magnitude and the sum of squares, in one pass over the weight and without a copy of it.
template <class T>
void scan_rows(const at::Tensor& part, double& largest, double& squares) {
  const T* const data = part.const_data_ptr<T>();
  for (int64_t i = 0; i < part.size(0); ++i) {
    const T* const row = data + i * part.stride(0);
    T most = 0;
    double sum[8] = {};
    int64_t j = 0;
    for (; j + 8 <= part.size(1); j += 8) {
      for (int e = 0; e < 8; ++e) {
        most = std::max(most, std::abs(row[j + e]));
        sum[e] += double(row[j + e]) * double(row[j + e]);
      }
    }
    for (; j < part.size(1); ++j) {
      most = std::max(most, std::abs(row[j]));
      sum[0] += double(row[j]) * double(row[j]);
    }
    largest = std::max(largest, double(most));
    squares += ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
  }
}

struct Extent {
  double largest = 0, squares = 0;  // squares: NaN or infinite if any entry is, for 16- and 32-bit weights
};

Extent scan(const at::Tensor& weight) {
  constexpr int64_t kRows = 64;  // a constant: the sum must not depend on the number of threads
  const int64_t d = weight.size(0), parts = (d + kRows - 1) / kRows;
  std::vector<Extent> found(static_cast<size_t>(parts));
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const OperatorGuard guard(weight.device());
    for (int64_t i = begin; i < end; ++i) {
      auto part = weight.narrow(0, i * kRows, std::min(kRows, d - i * kRows));
      if (part.scalar_type() != at::kDouble && part.scalar_type() != at::kFloat) part = part.to(at::kFloat);
      if (part.stride(1) != 1) part = part.contiguous();
      auto& [largest, squares] = found[size_t(i)];
      if (part.scalar_type() == at::kDouble) {
        scan_rows<double>(part, largest, squares);
      } else if (cpu::skinny()) {
        float most = 0;
        for (int64_t row = 0; row < part.size(0); ++row) {
          cpu::skinny()->scan(part.const_data_ptr<float>() + row * part.stride(0), part.size(1), &most, &squares);
        }
        largest = most;
      } else {
        scan_rows<float>(part, largest, squares);
      }
    }
  });
  Extent all;
  for (const auto& part : found) {
    all.largest = std::max(all.largest, part.largest);
    all.squares += part.squares;
  }
  return all;
}

void copy_rows(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows, int64_t n) {
  for (int64_t i = 0; i < rows; ++i) std::copy_n(from + i * from_stride, n, to + i * to_stride);
}

// total [k, n] = the sum of sums [groups, k, n], or of [groups, n, k] if `turned`; in one order, whoever made them.
void add_up(const at::Tensor& sums, bool turned, at::Tensor& total) {
  const int64_t k = total.size(0), n = total.size(1), groups = sums.size(0);
  with_wide_number(total.scalar_type(), [&](auto number) {
    using T = decltype(number);
    const T* const from = sums.const_data_ptr<T>();
    T* const to = total.mutable_data_ptr<T>();
    // Entries of one sum are neighbours along the longer side of a tile.
    at::parallel_for(0, (k + 63) / 64, 16, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * 64, last = std::min(end * 64, k);
      if (!turned) {
        for (int64_t i = first * n; i < last * n; ++i) to[i] = from[i];
        for (int64_t group = 1; group < groups; ++group) {
          for (int64_t i = first * n; i < last * n; ++i) to[i] += from[group * k * n + i];
        }
        return;
      }
      T row[64];
      for (int64_t tile = first; tile < last; tile += 64) {
        const int64_t width = std::min<int64_t>(64, last - tile);
        for (int64_t j = 0; j < n; ++j) {
          const T* const start = from + j * k + tile;
          for (int64_t i = 0; i < width; ++i) row[i] = start[i];
          for (int64_t group = 1; group < groups; ++group) {
            for (int64_t i = 0; i < width; ++i) row[i] += start[group * k * n + i];
          }
          for (int64_t i = 0; i < width; ++i) to[(tile + i) * n + j] = row[i];
        }
      }
    });
  });
}

}  // namespace

Panels::Panels(const at::Tensor& weight, at::ScalarType work) : weight_(weight), work_(work) {
  if (!weight.is_cpu()) {
    exponent_ = scale_exponent(weight);
    frobenius_ = at::linalg_vector_norm(whole()).item<double>();
    return;
  }
  const Extent extent = scan(weight);
  const bool wide_range = weight.scalar_type() == at::kDouble;  // its squares may leave the range of a double
  bool finite = std::isfinite(extent.largest) && std::isfinite(extent.squares);
  if (wide_range && !finite) finite = weight.isfinite().all().item<bool>();
  TORCH_CHECK_VALUE(finite, "osora::truncated_svd: a weight has NaN or infinite entries");
  if (extent.largest > 0) std::frexp(extent.largest, &exponent_);
  if (wide_range && std::abs(exponent_) > kMildExponent) {
    frobenius_ = at::linalg_vector_norm(whole()).item<double>();
  } else {
    frobenius_ = std::ldexp(std::sqrt(extent.squares), -exponent_);
  }
}

Panels Panels::in(at::ScalarType work) const {
  Panels other = *this;
  other.work_ = work;
  return other;
}

bool Panels::mild() const { return std::abs(exponent_) <= kMildExponent; }

// Rows of the weight as numbers of the working dtype; scaled where the products could not bear it.
at::Tensor Panels::converted(const at::Tensor& part) const {
  if (mild() && part.scalar_type() == work_ && part.stride(1) == 1) return part;
  auto copy = at::empty(part.sizes(), part.options().dtype(work_));
  copy.copy_(part);
  return mild() ? copy : scale_by(copy, -exponent_);
}

at::Tensor Panels::whole() const {
  auto copy = at::empty(weight_.sizes(), weight_.options().dtype(work_));
  copy.copy_(weight_);
  return scale_by(copy, -exponent_);
}

// x: y = A x is computed, else y is given. z: A^T y is computed.
void Panels::run(const at::Tensor* x, at::Tensor y, at::Tensor* z) const {
  const int64_t d = weight_.size(0), k = weight_.size(1), n = y.size(1);
  const double alpha = mild() ? std::ldexp(1.0, -exponent_) : 1.0;
  if (!weight_.is_cpu()) {
    const auto a = converted(weight_);
    if (x) y.copy_(at::mm(a, *x).mul_(alpha));
    if (z) *z = at::mm(a.t(), y).mul_(alpha);
    return;
  }
  const bool skinny = takes_skinny(work_, n) && y.stride(1) == 1;
  const bool as_it_is = weight_.scalar_type() == work_ && weight_.stride(1) == 1 && mild();
  const auto right = x ? x->contiguous() : at::Tensor();
  const int64_t rows = panel_rows(k, skinny), panels = (d + rows - 1) / rows;
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads(), groups = groups_for(panels, threads);
  auto sums = z ? at::empty({groups, skinny ? n : k, skinny ? k : n}, y.options()) : at::Tensor();

  float* const y_data = skinny ? y.mutable_data_ptr<float>() : nullptr;
  // `scratch`: of this thread, [rows, n]. `sum`: of this group.
  const auto skinny_panel = [&](int64_t begin, int64_t count, float* scratch, float* sum, bool add) {
    const auto part = as_it_is ? at::Tensor() : converted(weight_.narrow(0, begin, count));
    const float* const a =
        as_it_is ? weight_.const_data_ptr<float>() + begin * weight_.stride(0) : part.const_data_ptr<float>();
    const int64_t lda = as_it_is ? weight_.stride(0) : k;
    float* const out = y_data + begin * y.stride(0);
    if (x) {
      cpu::skinny()->times(a, count, k, lda, right.const_data_ptr<float>(), n, float(alpha), scratch);
      copy_rows(scratch, n, out, y.stride(0), count, n);
    } else {
      copy_rows(out, y.stride(0), scratch, n, count, n);
    }
    if (z) cpu::skinny()->back(a, count, k, lda, scratch, n, float(alpha), add, sum);
  };
  const auto wide_panel = [&](int64_t begin, int64_t count, at::Tensor sum, bool add) {
    const auto part = converted(weight_.narrow(0, begin, count));
    auto out = y.narrow(0, begin, count);
    if (x) at::addmm_out(out, out, part, right, 0, alpha);
    if (z) at::addmm_out(sum, sum, part.t(), out, add ? 1 : 0, alpha);
  };
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    const OperatorGuard guard(weight_.device());  // a thread of the pool starts without ours
    const SingleThreadedBlas alone;
    auto buffer = at::empty({skinny ? rows : 0, n}, y.options());
    for (int64_t group = next++; group < groups; group = next++) {
      const int64_t first = panels * group / groups, last = panels * (group + 1) / groups;
      const auto sum = z ? sums[group] : at::Tensor();
      float* const sum_data = z && skinny ? sum.mutable_data_ptr<float>() : nullptr;
      for (int64_t panel = first; panel < last; ++panel) {
        const int64_t begin = panel * rows, count = std::min(rows, d - begin);
        if (skinny) {
          skinny_panel(begin, count, buffer.mutable_data_ptr<float>(), sum_data, panel > first);
        } else {
          wide_panel(begin, count, sum, panel > first);
        }
      }
    }
  };
  if (threads == 1) {
    work(0, 1);
  } else {
    at::parallel_for(0, std::min(threads, groups), 1, work);
  }
  if (x) rounded(y, weight_, right, -exponent_);
  if (!z) return;
  if (groups == 1 && !skinny) {
    *z = sums[0];
  } else {
    *z = at::empty({k, n}, y.options());
    add_up(sums, skinny, *z);
  }
  rounded(*z, weight_.t(), y, -exponent_);
}

at::Tensor Panels::transposed_times(const at::Tensor& y) const {
  at::Tensor z;
  run(nullptr, y, &z);
  return z;
}

at::Tensor Panels::times_and_back(const at::Tensor& x, at::Tensor y) const {
  at::Tensor z;
  run(&x, y, &z);
  return z;
}

at::Tensor Panels::gram(bool of_rows) const {
  const double alpha = mild() ? std::ldexp(1.0, -exponent_) : 1.0;
  const int64_t along = of_rows ? 1 : 0, length = weight_.size(along), width = weight_.size(1 - along);
  constexpr int64_t kStep = 1024;
  auto g = at::empty({width, width}, weight_.options().dtype(work_));
  for (int64_t begin = 0; begin < length; begin += kStep) {
    const auto part = converted(weight_.narrow(along, begin, std::min(kStep, length - begin)));
    at::addmm_out(g, g, of_rows ? part : part.t(), of_rows ? part.t() : part, begin > 0 ? 1 : 0, alpha * alpha);
  }
  rounded(g, of_rows ? weight_ : weight_.t(), of_rows ? weight_.t() : weight_, -2 * exponent_);
  return g;
}

}  // namespace osora
