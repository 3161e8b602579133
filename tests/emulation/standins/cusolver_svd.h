// SPDX-License-Identifier: Apache-2.0
// What the SVD drivers have in common: one matrix in, S, U and V out.
#pragma once
#include "cusolver.h"

namespace osora::standins {

struct Svd {
  std::string routine;      // with every parameter that the workspace size may depend on
  Matrix A, S, U, V;        // U and V with no columns where they are not wanted; batched where the routine is
  bool transposed = false;  // V holds V^T
  bool destroys = true;     // A is NaN afterwards
  int64_t numbers() const { return A.batch * (A.rows + A.columns) * (A.columns + 7); }
};

// Shapes and types, without looking at the pointers. Returns the parameters in words.
std::string check_svd(cusolverDnHandle_t handle, const Svd& svd);
// Places, then the factors: the leading ones that fit into S, U and V; columns beyond `keep` are NaN. Needs a workspace
// that was asked for.
void solve_svd(const Call& call, cusolverDnHandle_t handle, const Svd& svd, const Workspace& workspace, int* info,
               int64_t keep);

// 64-bit interface: bytes on the device and on the host. Old interface: numbers on the device.
void remember_svd(cusolverDnHandle_t handle, const Svd& svd, size_t* device, size_t* host);
void remember_svd(cusolverDnHandle_t handle, const Svd& svd, int* numbers);

}  // namespace osora::standins
