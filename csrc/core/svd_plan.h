// SPDX-License-Identifier: Apache-2.0
// Everything about a truncated SVD that can be decided from integers, before a byte is allocated.
#pragma once
#include <cstdint>
#include <string>

namespace osora::core {

enum class SvdMethod : int64_t { kLanczos = 0, kGram = 1, kFull = 2 };

struct SvdPlan {
  SvdMethod method;
  bool transposed;  // the work is done on A = W^T, so that A is [rows, cols] with rows >= cols
  int64_t rows, cols, rank;
  int64_t block;  // Lanczos: new columns per step
  int64_t keep;   // Lanczos: columns that survive a restart
  int64_t basis;  // Lanczos: columns at which a restart is due
  int64_t bytes;  // estimate of the memory taken beyond the weight itself, per matrix
};

// weight: [d, k]; itemsize: bytes of the working dtype (4 or 8). `method` is "auto", "lanczos", "gram" or "full".
// Throws std::invalid_argument for anything else, or where the wished method cannot run.
SvdPlan plan_svd(int64_t d, int64_t k, int64_t rank, int64_t itemsize, const std::string& method);

}  // namespace osora::core
