// SPDX-License-Identifier: Apache-2.0
// osora::truncated_svd on ATen: check, choose, run core/svd.h, hand out. Serves CPU tensors, and those of any device.
#include "core/svd.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "core/svd_plan.h"
#include "torch/checks.h"
#include "torch/dense_aten.h"
#include "torch/guards.h"
#include "torch/workers.h"

namespace osora {
namespace {

// A matrix of at most this many entries runs on one thread, many side by side; a larger one uses every thread. The rule
// looks at the shape alone, so that a matrix gives the same bits alone and in any batch.
constexpr int64_t kOneThreadEntries = int64_t{1} << 20;
constexpr int64_t kMaxPasses = 600;

using Result = core::Found<at::Tensor>;

core::SvdPlan plan_or_refuse(int64_t d, int64_t k, int64_t rank, int64_t itemsize, const std::string& method) {
  try {
    return core::plan_svd(d, k, rank, itemsize, method);
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, "osora::truncated_svd: ", error.what());
  }
}

struct Attempt {
  at::ScalarType work;
  core::SvdMethod method;
};

// What to try until a certificate is reached: the planned method in the weight's own precision, the same in float64,
// and a full decomposition where Y^T Y, which squares the condition, was not enough.
std::vector<Attempt> attempts(const core::SvdPlan& plan, at::ScalarType natural) {
  using core::SvdMethod;
  std::vector<Attempt> list;
  // More than half of all triplets reach down to small singular values, which a float32 Gram matrix has lost.
  const bool hopeless = plan.method == SvdMethod::kGram && 2 * plan.rank > plan.cols;
  if (natural != at::kDouble && !hopeless) list.push_back({natural, plan.method});
  list.push_back({at::kDouble, plan.method});
  if (plan.method == SvdMethod::kGram || natural == at::kDouble) list.push_back({at::kDouble, SvdMethod::kFull});
  return list;
}

Result run(const Attempt& attempt, const core::SvdPlan& plan, const at::Tensor& weight, double tol, uint64_t seed,
           uint64_t key) {
  DenseAten dense({weight}, plan, attempt.work, accumulate_type(weight.scalar_type()), seed, {key});
  switch (attempt.method) {
    case core::SvdMethod::kGram:
      return dense.gram(0, tol);
    case core::SvdMethod::kFull:
      return dense.full(0, tol);
    default:
      return core::block_lanczos(std::move(dense), plan, tol, kMaxPasses).front();
  }
}

// The first certified answer, or else the one with the smallest residual, marked as not converged.
std::pair<Result, core::SvdMethod> decompose(const at::Tensor& weight, int64_t rank, double tol, uint64_t seed,
                                             uint64_t key, const std::string& method) {
  const auto natural = accumulate_type(weight.scalar_type());
  const auto plan = plan_or_refuse(weight.size(0), weight.size(1), rank, natural == at::kDouble ? 8 : 4, method);
  Result best;
  core::SvdMethod used = plan.method;
  double smallest = std::numeric_limits<double>::infinity();
  int64_t passes = 0;
  for (const auto& attempt : attempts(plan, natural)) {
    auto result = run(attempt, plan, weight, tol, seed, key);
    passes += result.passes;
    const double worst = result.residuals.max().item<double>();
    if (result.converged || !best.u.defined() || worst < smallest) {
      smallest = worst;
      used = attempt.method;
      best = std::move(result);
    }
    if (best.converged) break;
  }
  best.passes = passes;
  return {best, used};
}

void check_truncated_svd(at::TensorList weights, int64_t rank, double tol, at::IntArrayRef keys) {
  TORCH_CHECK_VALUE(keys.size() == weights.size(), "osora::truncated_svd: one key per weight is needed, got ",
                    keys.size(), " keys for ", weights.size(), " weights");
  TORCH_CHECK_VALUE(tol > 0, "osora::truncated_svd: tol must be positive, got ", tol);
  const auto& first = weights.front();
  for (const auto& w : weights) {
    TORCH_CHECK_VALUE(w.dim() == 2 && w.numel() > 0,
                      "osora::truncated_svd: a weight must be a non-empty matrix, got shape ", w.sizes());
    TORCH_CHECK_VALUE(w.sizes() == first.sizes() && w.device() == first.device(),
                      "osora::truncated_svd: weights must share one shape and device, got ", w.sizes(), " on ",
                      w.device(), " beside ", first.sizes(), " on ", first.device());
    TORCH_CHECK_TYPE(is_supported_float(w.scalar_type()) && w.scalar_type() == first.scalar_type(),
                     "osora::truncated_svd: weights must all be float64, float32, bfloat16 or float16, got ",
                     w.scalar_type());
  }
  const int64_t most = std::min(first.size(0), first.size(1));
  TORCH_CHECK_VALUE(rank >= 1 && rank <= most, "osora::truncated_svd: rank must be in 1 .. min(shape) = ", most,
                    ", got ", rank);
}

using Output = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Output truncated_svd(at::TensorList weights, int64_t rank, double tol, int64_t seed, at::IntArrayRef keys,
                     std::string method) {
  check_truncated_svd(weights, rank, tol, keys);
  const auto& first = weights.front();
  const OperatorGuard guard(first.device());
  const int64_t count = int64_t(weights.size()), d = first.size(0), k = first.size(1);
  plan_or_refuse(d, k, rank, first.scalar_type() == at::kDouble ? 8 : 4,
                 method);  // a wrong method fails before any work
  const auto options = first.options().dtype(accumulate_type(first.scalar_type()));
  const auto host = at::TensorOptions().dtype(at::kLong);
  auto U = at::empty({count, d, rank}, options), S = at::empty({count, rank}, options);
  auto V = at::empty({count, k, rank}, options);
  auto residuals = at::empty({count, rank}, at::TensorOptions().dtype(at::kDouble));
  auto converged = at::zeros({count}, host.dtype(at::kBool)), passes = at::zeros({count}, host),
       used = at::zeros({count}, host);

  const auto one = [&](int64_t i) {
    const OperatorGuard inner(first.device());  // a worker thread starts without ours
    const auto [result, method_used] = decompose(weights[i], rank, tol, uint64_t(seed), uint64_t(keys[i]), method);
    U[i].copy_(result.u);
    S[i].copy_(result.s);
    V[i].copy_(result.v);
    residuals[i].copy_(result.residuals);
    converged.mutable_data_ptr<bool>()[i] = result.converged;
    passes.mutable_data_ptr<int64_t>()[i] = result.passes;
    used.mutable_data_ptr<int64_t>()[i] = int64_t(method_used);
  };
  if (first.is_cpu() && d * k <= kOneThreadEntries) {
    run_single_threaded(count, one);
  } else {
    for (int64_t i = 0; i < count; ++i) one(i);
  }
  return {U, S, V, residuals, converged, passes, used};
}

}  // namespace

TORCH_LIBRARY_IMPL(osora, CPU, m) { m.impl("truncated_svd", &truncated_svd); }
TORCH_LIBRARY_IMPL(osora, CUDA, m) { m.impl("truncated_svd", &truncated_svd); }

}  // namespace osora
