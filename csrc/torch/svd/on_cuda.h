// SPDX-License-Identifier: Apache-2.0
// The truncated SVD of weights on a GPU, ours and cuSOLVER's: csrc/cuda/svd/dense_cuda.h and svd_drivers.h between
// tensors. No CUDA header here; defined where the extension is built with CUDA.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "core/dense.h"
#include "core/svd_plan.h"

namespace osora {

// weights: finite matrices [d, k] of one shape, dtype and device, decomposed together: they must fit into its memory,
// by plan.bytes each. work: float32, or float64 (always for float64 weights). Returns for each of them u [d, r], s, v
// [k, r] on the device and the residuals on the host. Waits for the device once per restart and once per certificate.
std::vector<core::Found<at::Tensor>> lanczos_cuda(const std::vector<at::Tensor>& weights, const core::SvdPlan& plan,
                                                  at::ScalarType work, double tol, uint64_t seed,
                                                  const std::vector<uint64_t>& keys, int64_t max_passes);

// The same from the eigenvectors of A^T A.
std::vector<core::Found<at::Tensor>> gram_cuda(const std::vector<at::Tensor>& weights, const core::SvdPlan& plan,
                                               at::ScalarType work, double tol, uint64_t seed,
                                               const std::vector<uint64_t>& keys);

// U [d, r], S [r], V [k, r] in the working dtype: what a driver gave, not certified.
struct Factors {
  at::Tensor U, S, V;
};

// weight: a finite CUDA matrix [d, k] of a supported float dtype; method: kGesvd .. kGesvdr.
// Throws std::invalid_argument where core::refuse_driver does, core::DriverFailed where the driver ran and has no
// answer.
Factors svd_driver_cuda(const at::Tensor& weight, core::SvdMethod method, int64_t rank);

// Frobenius norms of weights of one dtype and device; the host waits once. A ValueError where an entry is NaN or
// infinite.
std::vector<double> norms_cuda(const std::vector<at::Tensor>& weights);

// Bytes of the current device that are free, or cached by torch and not in use.
int64_t free_memory_cuda();

}  // namespace osora
