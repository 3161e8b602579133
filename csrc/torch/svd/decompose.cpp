// SPDX-License-Identifier: Apache-2.0
#include "torch/svd/decompose.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "core/lanczos.h"
#include "core/svd_drivers_limits.h"
#include "core/svd_plan.h"
#include "core/svd_verdict.h"
#include "torch/common/checks.h"
#include "torch/common/guards.h"
#include "torch/common/workers.h"
#include "torch/svd/dense_aten.h"
#include "torch/svd/on_card.h"
#include "torch/svd/panels.h"
#include "torch/svd/scale.h"
#ifdef OSORA_CUDA
#include "torch/svd/on_cuda.h"
#endif

namespace osora {
namespace {

constexpr int64_t kMaxPasses = 600;
constexpr int64_t kLowrankIterations = 16;  // as PEFT's pissa_niter_16

using core::SvdMethod;
using Result = core::Found<at::Tensor>;

core::SvdPlan plan_or_refuse(const at::Tensor& weight, int64_t rank, const std::string& method, int64_t threads) {
  const int64_t d = weight.size(0), k = weight.size(1), itemsize = weight.scalar_type() == at::kDouble ? 8 : 4;
  try {
    const core::SvdMachine machine{on_card(weight), threads};
    const auto plan = core::plan_svd(d, k, rank, itemsize, weight.element_size(), method, machine);
    if (plan.method >= SvdMethod::kGesvd) core::refuse_driver(plan.method, d, k, rank, itemsize);
    return plan;
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, "osora::truncated_svd: ", error.what());
  }
}

struct Attempt {
  at::ScalarType work;
  SvdMethod method;
};

// What to try until a certificate is reached: the planned method in the weight's own precision, the same in float64,
// and a full decomposition where Y^T Y, which squares the condition, was not enough. A method that is there for
// comparison has one attempt.
std::vector<Attempt> attempts(const core::SvdPlan& plan, at::ScalarType natural) {
  if (plan.method >= SvdMethod::kLowrank) return {{natural, plan.method}};
  std::vector<Attempt> list;
  const bool hopeless = plan.method == SvdMethod::kGram && core::gram_in_float64(plan);
  if (natural != at::kDouble && !hopeless) list.push_back({natural, plan.method});
  list.push_back({at::kDouble, plan.method});
  if (plan.method == SvdMethod::kGram || natural == at::kDouble) list.push_back({at::kDouble, SvdMethod::kFull});
  return list;
}

// A batch of matrices of one shape, dtype and device, and what is asked of them.
struct Task {
  std::vector<at::Tensor> weights;
  std::vector<double> norms;    // Frobenius
  std::vector<Panels> scanned;  // on the CPU, where one pass gives norms and panels
  std::vector<uint64_t> keys;
  core::SvdPlan plan;
  double tol;
  uint64_t seed;

  Task only(const std::vector<size_t>& chosen) const {
    Task some{{}, {}, {}, {}, plan, tol, seed};
    for (const size_t i : chosen) {
      some.weights.push_back(weights[i]);
      some.norms.push_back(norms[i]);
      if (!scanned.empty()) some.scanned.push_back(scanned[i]);
      some.keys.push_back(keys[i]);
    }
    return some;
  }

  Panels panels(size_t i) const {
    return scanned.empty() ? Panels(weights[i], accumulate_type(weights[i].scalar_type())) : scanned[i];
  }
};

// The weights are found finite here, or refused.
Task make_task(const std::vector<at::Tensor>& weights, const core::SvdPlan& plan, double tol, uint64_t seed) {
  Task task{weights, {}, {}, {}, plan, tol, seed};
#ifdef OSORA_CUDA
  if (on_card(weights.front())) {
    task.norms = norms_cuda(weights);
    return task;
  }
#endif
  for (const auto& weight : weights) {
    const Panels& panels = task.scanned.emplace_back(weight, accumulate_type(weight.scalar_type()));
    task.norms.push_back(std::ldexp(panels.frobenius(), panels.exponent()));
  }
  return task;
}

// One matrix by ATen, on any device.
Result run_aten(const Task& task, size_t i, const Attempt& attempt, const core::SvdPlan& plan) {
  const auto& weight = task.weights[i];
  DenseAten dense({task.panels(i)}, plan, weight.options().dtype(attempt.work), accumulate_type(weight.scalar_type()),
                  task.seed, {task.keys[i]});
  const auto finished = [&](at::Tensor vectors) {
    return core::finish(dense, std::move(vectors), task.tol, nullptr, 0).front().found;
  };
  switch (attempt.method) {
    case SvdMethod::kGram:
      return finished(dense.gram_vectors());
    case SvdMethod::kFull:
      return dense.full(task.tol).front().found;
    case SvdMethod::kLowrank: {
      auto found = finished(dense.subspace_iteration(kLowrankIterations));
      found.passes += 2 * kLowrankIterations + 2;
      found.columns += (2 * kLowrankIterations + 2) * plan.rank;
      return found;
    }
    default:
      return core::block_lanczos(dense, task.tol, kMaxPasses).front();
  }
}

#ifdef OSORA_CUDA
// One matrix by a driver of cuSOLVER in the attempt's precision, certified like any other.
Result run_driver(const Task& task, size_t i, const Attempt& attempt, const core::SvdPlan& plan) {
  const auto& weight = task.weights[i];
  const auto method = attempt.method == SvdMethod::kFull ? SvdMethod::kGesvdp : attempt.method;
  const auto [U, S, V] = svd_driver_cuda(weight.to(attempt.work), method, plan.rank);
  if (!at::cat({U.flatten(), V.flatten()}).isfinite().all().item<bool>()) {
    throw core::DriverFailed("method \"" + core::svd_method_names()[size_t(method)] +
                             "\" gave NaN or infinite singular vectors");
  }
  const Panels panels = task.panels(i);
  const DenseAten dense({panels}, plan, weight.options().dtype(attempt.work), accumulate_type(weight.scalar_type()),
                        task.seed, {task.keys[i]});
  const auto s = scale_by(S.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true), -panels.exponent());
  const auto values = s.view({1, 1, plan.rank});
  auto candidates =
      dense.report(dense.certify(U.unsqueeze(0), values, V.unsqueeze(0), task.tol), values, nullptr, task.tol);
  candidates.front().found.passes = 1;
  candidates.front().found.columns = plan.rank;
  return candidates.front().found;
}

// A matrix whose driver failed gets an empty result, and the reason in `failures`.
std::vector<Result> run_cuda(const Task& task, const Attempt& attempt, const core::SvdPlan& plan,
                             std::vector<std::string>& failures) {
  if (attempt.method == SvdMethod::kLanczos) {
    return lanczos_cuda(task.weights, plan, attempt.work, task.tol, task.seed, task.keys, kMaxPasses);
  }
  if (attempt.method == SvdMethod::kGram) {
    return gram_cuda(task.weights, plan, attempt.work, task.tol, task.seed, task.keys);
  }
  std::vector<Result> results(task.weights.size());
  for (size_t i = 0; i < results.size(); ++i) {
    if (attempt.method == SvdMethod::kLowrank) {
      results[i] = run_aten(task, i, attempt, plan);
      continue;
    }
    try {
      results[i] = run_driver(task, i, attempt, plan);
    } catch (const core::DriverFailed& failure) {
      failures[i] = failure.what();
    }
  }
  return results;
}
#endif

std::vector<Result> run(const Task& task, const Attempt& attempt, [[maybe_unused]] std::vector<std::string>& failures) {
  core::SvdPlan plan = task.plan;
  plan.method = attempt.method;
#ifdef OSORA_CUDA
  if (on_card(task.weights.front())) return run_cuda(task, attempt, plan, failures);
#endif
  std::vector<Result> results;
  for (size_t i = 0; i < task.weights.size(); ++i) results.push_back(run_aten(task, i, attempt, plan));
  return results;
}

struct Answer {
  Result result;
  SvdMethod method = SvdMethod::kLanczos;
};

// A Gram matrix is rounded at epsilon sigma_1^2, so its eigenvectors mix, and may leave out, what differs by less:
// sigma is then off by up to epsilon (sigma_1 / sigma)^2 / 2, which no residual shows. Allowed is 1e-5. Of what is
// called zero to rounding, it must not have left out anything above the floor.
bool gram_has_lost(const Result& result, at::ScalarType work) {
  const auto s = result.s.to(at::kDouble);
  const double largest = s.max().item<double>(), smallest = std::max(s.min().item<double>(), result.floor);
  return epsilon(work) * largest * largest > 2e-5 * smallest * smallest;
}

// For each matrix the first certified answer, or else the one with the smallest residual, marked as not converged. A
// driver that fails is an attempt without an answer; where there is no other, its reason is the error.
std::vector<Answer> decompose(const Task& task) {
  std::vector<Answer> answers(task.weights.size());
  std::vector<double> smallest(task.weights.size(), std::numeric_limits<double>::infinity());
  std::vector<size_t> left(task.weights.size());
  std::iota(left.begin(), left.end(), size_t{0});
  const auto list = attempts(task.plan, accumulate_type(task.weights.front().scalar_type()));
  for (size_t a = 0; a < list.size(); ++a) {
    const Attempt& attempt = list[a];
    std::vector<std::string> failures(left.size());
    auto results = run(task.only(left), attempt, failures);
    std::vector<size_t> still;
    for (size_t j = 0; j < left.size(); ++j) {
      Answer& best = answers[left[j]];
      Result& result = results[j];
      if (!result.u.defined()) {
        TORCH_CHECK(best.result.u.defined() || a + 1 < list.size(), "osora::truncated_svd: ", failures[j]);
        still.push_back(left[j]);
        continue;
      }
      if (attempt.method == SvdMethod::kGram && gram_has_lost(result, attempt.work)) result.converged = false;
      if (result.can_be_finer && a + 1 < list.size()) result.converged = false;
      const int64_t passes = best.result.passes + result.passes, columns = best.result.columns + result.columns;
      const double worst = result.residuals.max().item<double>();
      if (result.converged || !best.result.u.defined() || worst < smallest[left[j]]) {
        smallest[left[j]] = worst;
        best.method = attempt.method;
        best.result = std::move(result);
      }
      best.result.passes = passes;
      best.result.columns = columns;
      if (!best.result.converged) still.push_back(left[j]);
    }
    left = std::move(still);
    if (left.empty()) break;
  }
  return answers;
}

void check_truncated_svd(at::TensorList weights, int64_t rank, double tol, at::IntArrayRef keys, int64_t max_memory) {
  TORCH_CHECK_VALUE(keys.size() == weights.size(), "osora::truncated_svd: one key per weight is needed, got ",
                    keys.size(), " keys for ", weights.size(), " weights");
  TORCH_CHECK_VALUE(tol > 0, "osora::truncated_svd: tol must be positive, got ", tol);
  TORCH_CHECK_VALUE(max_memory >= 0, "osora::truncated_svd: max_memory must not be negative, got ", max_memory);
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

// How many matrices may be in work at the same time; 0 for max_memory: as many as asked for.
int64_t at_once(const core::SvdPlan& plan, int64_t wanted, int64_t max_memory) {
  if (max_memory == 0) return wanted;
  TORCH_CHECK_VALUE(plan.bytes <= max_memory, "osora::truncated_svd: a matrix [",
                    plan.transposed ? plan.cols : plan.rows, ", ", plan.transposed ? plan.rows : plan.cols, "] takes ",
                    plan.bytes, " bytes by method \"", core::svd_method_names()[size_t(plan.method)],
                    "\", and max_memory is ", max_memory);
  return std::min(wanted, max_memory / plan.bytes);
}

// What a device has free for this, for a call without max_memory: half of it, since the caller has plans of his own.
int64_t spare_memory([[maybe_unused]] const core::SvdPlan& plan) {
#ifdef OSORA_CUDA
  return std::max(plan.bytes, free_memory_cuda() / 2);
#else
  return plan.bytes;  // one after the other
#endif
}

}  // namespace

Decomposed truncated_svd(at::TensorList weights, int64_t rank, double tol, int64_t seed, at::IntArrayRef keys,
                         std::string method, int64_t max_memory) {
  check_truncated_svd(weights, rank, tol, keys, max_memory);
  const auto& first = weights.front();
  const OperatorGuard guard(first.device());
  const int64_t count = int64_t(weights.size()), d = first.size(0), k = first.size(1);
  const bool on_cpu = first.is_cpu() && !on_card(first), one_thread_each = on_cpu && d * k <= kOneThreadEntries;
  const auto plan = plan_or_refuse(first, rank, method, one_thread_each ? 1 : at::get_num_threads());
  const int64_t together = on_cpu ? (one_thread_each ? at::get_num_threads() : 1) : count;
  const int64_t limit = max_memory > 0 || on_cpu ? max_memory : spare_memory(plan);
  const int64_t at_most = at_once(plan, std::min(together, count), limit);
  const auto options = first.options().dtype(accumulate_type(first.scalar_type()));
  const auto host = at::TensorOptions().dtype(at::kLong);
  auto U = at::empty({count, d, rank}, options), S = at::empty({count, rank}, options);
  auto V = at::empty({count, k, rank}, options);
  auto residuals = at::empty({count, rank}, at::TensorOptions().dtype(at::kDouble));
  auto norms = at::zeros({count}, at::TensorOptions().dtype(at::kDouble));
  auto converged = at::zeros({count}, host.dtype(at::kBool)), passes = at::zeros({count}, host),
       columns = at::zeros({count}, host), used = at::zeros({count}, host);
  auto floors = at::zeros_like(norms);

  const auto some = [&](int64_t begin, int64_t end) {
    const OperatorGuard inner(first.device());  // a worker thread starts without ours
    const auto range = weights.slice(size_t(begin), size_t(end - begin));
    Task task = make_task(range.vec(), plan, tol, uint64_t(seed));
    task.keys.assign(keys.begin() + begin, keys.begin() + end);
    const auto answers = decompose(task);
    for (int64_t i = begin; i < end; ++i) {
      const auto& [result, method_used] = answers[size_t(i - begin)];
      U[i].copy_(result.u);
      S[i].copy_(result.s);
      V[i].copy_(result.v);
      residuals[i].copy_(result.residuals);
      norms.mutable_data_ptr<double>()[i] = task.norms[size_t(i - begin)];
      converged.mutable_data_ptr<bool>()[i] = result.converged;
      passes.mutable_data_ptr<int64_t>()[i] = result.passes;
      columns.mutable_data_ptr<int64_t>()[i] = result.columns;
      used.mutable_data_ptr<int64_t>()[i] = int64_t(method_used);
      floors.mutable_data_ptr<double>()[i] = result.floor;
    }
  };
  if (one_thread_each) {
    run_single_threaded(count, at_most, [&](int64_t i) { some(i, i + 1); });
  } else {
    for (int64_t begin = 0; begin < count; begin += at_most) some(begin, std::min(begin + at_most, count));
  }
  return {U, S, V, residuals, converged, passes, used, columns, norms, floors};
}

}  // namespace osora
