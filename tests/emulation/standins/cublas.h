// SPDX-License-Identifier: Apache-2.0
// The state behind a cublasHandle_t.
#pragma once
#include <cublas_v2.h>

#include <vector>

#include "arrays.h"

struct cublasContext {
  cudaStream_t stream = nullptr;
  cublasMath_t math = CUBLAS_DEFAULT_MATH;
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
};

namespace osora::standins {

// Live, on the current stream, its workspace still there and apart from the operands; spoils that workspace.
void need_ready(cublasHandle_t handle, const std::vector<Matrix>& operands);

}  // namespace osora::standins
