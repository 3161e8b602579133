// SPDX-License-Identifier: Apache-2.0
#include "arrays.h"

#include <ATen/Functions.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <limits>

#include "call.h"
#include "memory.h"

namespace osora::standins {
namespace {

struct Interval {
  const char* begin;
  const char* end;
  const char* name;
  bool operator<(const Interval& other) const { return begin < other.begin; }
};

// The columns of every matrix, ascending; neighbours that touch are one.
std::vector<Interval> occupied(const std::vector<Matrix>& matrices, bool once) {
  std::vector<Interval> all;
  for (const Matrix& m : matrices) {
    const auto size = static_cast<int64_t>(bytes_of(m.type));
    if (m.rows == 0) continue;
    for (int64_t b = 0; b < (once && m.stride == 0 ? std::min<int64_t>(m.batch, 1) : m.batch); ++b) {
      for (int64_t c = 0; c < m.columns; ++c) {
        const char* begin = static_cast<const char*>(m.data) + (b * m.stride + c * m.ld) * size;
        if (!all.empty() && all.back().end == begin && all.back().name == m.name) {
          all.back().end = begin + m.rows * size;
        } else {
          all.push_back({begin, begin + m.rows * size, m.name});
        }
      }
    }
  }
  std::sort(all.begin(), all.end());
  return all;
}

at::ScalarType scalar_type(cudaDataType type) {
  switch (type) {
    case CUDA_R_64F:
      return at::kDouble;
    case CUDA_R_32F:
      return at::kFloat;
    case CUDA_R_16BF:
      return at::kBFloat16;
    case CUDA_R_16F:
      return at::kHalf;
    default:
      throw Refused{text(name_of(type), " is not modelled")};
  }
}

}  // namespace

size_t bytes_of(cudaDataType type) {
  switch (type) {
    case CUDA_R_64F:
      return 8;
    case CUDA_R_32F:
    case CUDA_R_32I:
      return 4;
    case CUDA_R_16BF:
    case CUDA_R_16F:
      return 2;
    case CUDA_R_8U:
      return 1;
    default:
      throw Refused{text(name_of(type), " is not modelled")};
  }
}

const char* name_of(cudaDataType type) {
  switch (type) {
    case CUDA_R_64F:
      return "float64";
    case CUDA_R_32F:
      return "float32";
    case CUDA_R_16BF:
      return "bfloat16";
    case CUDA_R_16F:
      return "float16";
    default:
      return "this data type";
  }
}

void need_device(const Matrix& m) {
  need(m.rows >= 0 && m.columns >= 0 && m.batch >= 0, m.name, " has a negative size");
  need(m.ld >= std::max<int64_t>(1, m.rows), m.name, " has ", m.rows, " rows and leading dimension ", m.ld);
  need(m.stride >= 0, m.name, " has a negative stride, ", m.stride);
  if (m.rows == 0 || m.columns == 0 || m.batch == 0) return;
  const size_t size = bytes_of(m.type);
  const int64_t numbers = (m.batch - 1) * m.stride + (m.columns - 1) * m.ld + m.rows;
  need(reinterpret_cast<uintptr_t>(m.data) % size == 0, m.name, " is not aligned to ", size, " bytes");
  if (const auto why = outside(m.data, static_cast<size_t>(numbers) * size)) throw Refused{text(m.name, " ", *why)};
}

void need_info(const int* info, int64_t batch) {
  need_device({"info", info, CUDA_R_32I, batch, 1, std::max<int64_t>(1, batch)});
}

void need_disjoint(const std::vector<Matrix>& written, const std::vector<Matrix>& others) {
  const auto out = occupied(written, /*once=*/false);
  for (size_t k = 1; k < out.size(); ++k)
    need(out[k].begin >= out[k - 1].end, out[k - 1].name, " and ", out[k].name, ", both written to, overlap");
  const auto in = occupied(others, /*once=*/true);
  for (const Interval& each : in) {
    // The first output that ends behind the begin of `each`; outputs are disjoint, so their ends ascend too.
    const auto near =
        std::partition_point(out.begin(), out.end(), [&](const Interval& o) { return o.end <= each.begin; });
    need(near == out.end() || near->begin >= each.end, near == out.end() ? "" : near->name, " overlaps ", each.name);
  }
}

at::Tensor view(const Matrix& m, int64_t index) {
  auto* data =
      static_cast<char*>(const_cast<void*>(m.data)) + index * m.stride * static_cast<int64_t>(bytes_of(m.type));
  return at::from_blob(data, {m.rows, m.columns}, {1, m.ld}, at::TensorOptions().dtype(scalar_type(m.type)));
}

void fill_nan(const Matrix& m, int64_t index) { view(m, index).fill_(std::numeric_limits<double>::quiet_NaN()); }

bool all_finite(const Matrix& m, int64_t index) { return at::isfinite(view(m, index)).all().item<bool>(); }

std::vector<Matrix> matrices_at(const char* name, const void* const* pointers, int64_t batch, const Matrix& shape) {
  need(batch >= 0, "a batch of ", batch);
  if (const auto why = outside(pointers, static_cast<size_t>(batch) * sizeof(void*)))
    throw Refused{text("the array of pointers ", name, " ", *why)};
  need(reinterpret_cast<uintptr_t>(pointers) % sizeof(void*) == 0, "the array of pointers ", name, " is not aligned");
  std::vector<Matrix> all;
  for (int64_t k = 0; k < batch; ++k) {
    all.push_back(shape);
    all.back().data = pointers[k];
    need_device(all.back());
  }
  return all;
}

}  // namespace osora::standins
