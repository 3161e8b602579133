// SPDX-License-Identifier: Apache-2.0
// From tensors to cuda/svd/dense_cuda.h and back. Shared by on_cuda.cpp and by the emulator of the tests, so that the
// tests run this code too.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>

#include <cmath>
#include <memory>
#include <stdexcept>
#include <vector>

#include "core/lanczos.h"
#include "cuda/svd/dense_cuda.h"
#include "torch/common/checks.h"
#include "torch/svd/scale.h"

namespace osora {

inline cuda::Type cuda_type(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return cuda::Type::kFloat64;
    case at::kBFloat16:
      return cuda::Type::kBFloat16;
    case at::kHalf:
      return cuda::Type::kFloat16;
    default:
      return cuda::Type::kFloat32;
  }
}

// A copy, row by row, of one matrix that lies column by column at `array`. A vector [1, n] becomes [n].
inline at::Tensor tensor_of(const cuda::CudaArray& array, const at::TensorOptions& options) {
  const auto typed = options.dtype(array.type == cuda::Type::kFloat64 ? at::kDouble : at::kFloat);
  const auto view = at::from_blob(
      array.data, {array.rows, array.cols}, {1, array.rows}, [](void*) {}, typed,
      typed.device());  // which needs no question to the driver
  return at::empty({array.rows, array.cols}, typed).copy_(view);
}

// Frobenius norms of weights on one device, with one wait for all of them. A ValueError where an entry is NaN or
// infinite. A weight whose squares leave the range of float32 is scaled and summed again.
inline std::vector<double> frobenius_norms(const std::vector<at::Tensor>& weights) {
  const auto type = accumulate_type(weights.front().scalar_type());
  std::vector<at::Tensor> each;
  for (const auto& weight : weights) each.push_back(at::linalg_vector_norm(weight, 2, std::nullopt, false, type));
  const auto host = at::stack(each).to(at::kCPU, at::kDouble);
  std::vector<double> norms(host.const_data_ptr<double>(), host.const_data_ptr<double>() + host.numel());
  for (size_t i = 0; i < weights.size(); ++i) {
    if (norms[i] > 1e-15 && norms[i] < 1e+18) continue;
    const int exponent = scale_exponent(weights[i]);
    const auto scaled = scale_by(weights[i].to(type, /*non_blocking=*/false, /*copy=*/true), -exponent);
    norms[i] = std::ldexp(at::linalg_vector_norm(scaled).item<double>(), exponent);
  }
  return norms;
}

// The weights, made contiguous, and the run of one method on them: method(DenseCuda) gives Found per matrix.
template <class Method>
std::vector<core::Found<at::Tensor>> svd_launch(const std::vector<at::Tensor>& weights, const core::SvdPlan& plan,
                                                const cuda::DenseOptions& options, const std::vector<uint64_t>& keys,
                                                cuda::Context& context, Method method) {
  std::vector<at::Tensor> held;
  std::vector<const void*> addresses;
  for (const auto& weight : weights) {
    held.push_back(weight.contiguous());
    addresses.push_back(held.back().const_data_ptr());
  }
  const auto on_device = weights.front().options(), on_host = on_device.device(at::kCPU);
  std::vector<core::Found<at::Tensor>> results;
  try {
    const auto type = cuda_type(weights.front().scalar_type());
    for (const auto& found : method(cuda::DenseCuda(context, addresses, type, plan, options, keys))) {
      results.push_back({tensor_of(found.u, on_device), tensor_of(found.s, on_device).squeeze(0),
                         tensor_of(found.v, on_device), tensor_of(found.residuals, on_host).squeeze(0), found.floor,
                         found.converged, found.can_be_finer, found.passes, found.columns});
    }
  } catch (const std::range_error& error) {
    TORCH_CHECK_VALUE(false, "osora::truncated_svd: ", error.what(),
                      ": scale the weight down, or convert it to float64");
  }
  return results;
}

inline std::vector<core::Found<at::Tensor>> lanczos_launch(const std::vector<at::Tensor>& weights,
                                                           const core::SvdPlan& plan, const cuda::DenseOptions& options,
                                                           const std::vector<uint64_t>& keys, int64_t max_passes,
                                                           cuda::Context& context) {
  return svd_launch(weights, plan, options, keys, context, [&](cuda::DenseCuda dense) {
    return core::block_lanczos(std::move(dense), options.tol, max_passes);
  });
}

inline std::vector<core::Found<at::Tensor>> gram_launch(const std::vector<at::Tensor>& weights,
                                                        const core::SvdPlan& plan, const cuda::DenseOptions& options,
                                                        const std::vector<uint64_t>& keys, cuda::Context& context) {
  return svd_launch(weights, plan, options, keys, context, [&](cuda::DenseCuda dense) {
    const cuda::CudaArray vectors = dense.gram_vectors();
    std::vector<core::Found<cuda::CudaArray>> found;
    for (auto& candidate : core::finish(std::move(dense), vectors, options.tol, nullptr, 0)) {
      found.push_back(std::move(candidate.found));
    }
    return found;
  });
}

}  // namespace osora
