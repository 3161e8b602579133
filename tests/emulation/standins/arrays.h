// SPDX-License-Identifier: Apache-2.0
// Column-major matrices in device memory: their rules, and ATen views of them.
#pragma once
#include <ATen/core/Tensor.h>
#include <library_types.h>

#include <cstdint>
#include <vector>

namespace osora::standins {

// `batch` matrices [rows, columns], columns `ld` numbers apart, matrices `stride` numbers apart.
struct Matrix {
  const char* name;
  const void* data;
  cudaDataType type;
  int64_t rows, columns, ld;
  int64_t batch = 1, stride = 0;
};

size_t bytes_of(cudaDataType type);
const char* name_of(cudaDataType type);

// Sizes >= 0, ld >= max(1, rows), every number inside one live range, the first one aligned.
void need_device(const Matrix& matrix);
// The same for the info numbers of a batch.
void need_info(const int* info, int64_t batch);
// Those are written to: no two of their numbers share a byte, and none lies in one of `others`.
void need_disjoint(const std::vector<Matrix>& written, const std::vector<Matrix>& others);

at::Tensor view(const Matrix& matrix, int64_t index = 0);
void fill_nan(const Matrix& matrix, int64_t index = 0);
bool all_finite(const Matrix& matrix, int64_t index = 0);

// The pointers of a batch, which lie in device memory themselves, as matrices of their own.
std::vector<Matrix> matrices_at(const char* name, const void* const* pointers, int64_t batch, const Matrix& shape);

}  // namespace osora::standins
