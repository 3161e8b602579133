// SPDX-License-Identifier: Apache-2.0
// The state behind cuSOLVER's handles and parameters, and what its routines have in common.
#pragma once
#include <cusolverDn.h>

#include <vector>

#include "arrays.h"
#include "call.h"
#include "workspace.h"

struct cusolverDnContext {
  cudaStream_t stream = nullptr;
  cusolverDeterministicMode_t mode = CUSOLVER_DETERMINISTIC_RESULTS;
};
struct cusolverDnParams {
  cusolverAlgMode_t batched_eigen = CUSOLVER_ALG_0;
};
struct gesvdjInfo {
  double tolerance = 0;
  int max_sweeps = 100;
};

namespace osora::standins {

constexpr const char* kSolver = "cuSOLVER handle";
constexpr const char* kParams = "cuSOLVER parameters";
constexpr const char* kJacobi = "gesvdj parameters";
constexpr int64_t kInt32Max = 2147483647;

template <class Body>
cusolverStatus_t run_solver(const char* name, Body&& body) {
  return answer(name, CUSOLVER_STATUS_INVALID_VALUE, std::forward<Body>(body));
}

void need_solver(cusolverDnHandle_t handle);  // live, on the current stream
void need_params(cusolverDnParams_t params);

// All of a routine's types are the same, float32 or float64.
void need_types(std::initializer_list<cudaDataType> types);

// The info of matrix `index`: `computed`, unless a fault is planted. Where it is not 0, `results` become NaN.
void write_info(const Call& call, int* info, int64_t index, int computed, std::initializer_list<Matrix> results);

}  // namespace osora::standins
