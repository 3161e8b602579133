// SPDX-License-Identifier: Apache-2.0
// The truncated SVD of csrc/cuda on CPU tensors: kernels by the emulator, cuBLAS and cuSOLVER by the stand-ins. Sees
// the real CUDA headers, not the emulator's.
#include <ATen/Functions.h>
#include <torch/library.h>

#include <list>

#include "core/svd_plan.h"
#include "cuda/svd/math_libraries.h"
#include "memory.h"
#include "standins.h"
#include "torch/svd/svd_launch.h"

namespace osora {
namespace {

class StandinMemory : public cuda::Allocator {
 public:
  std::shared_ptr<void> allocate(size_t bytes) override { return standins::allocate(bytes); }
};

// What only tests wish for.
struct Wishes {
  bool float64_work = false;
  int64_t temporary_bytes = 0, max_passes = 0;
};

using Output =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Output decompose(at::TensorList weights, int64_t rank, double tol, int64_t seed, at::IntArrayRef keys,
                 const std::string& method, const Wishes& wishes) {
  std::vector<at::Tensor> contiguous;
  std::list<standins::Lent> on_device;
  for (const auto& weight : weights) {
    contiguous.push_back(weight.contiguous());
    on_device.emplace_back(contiguous.back().const_data_ptr(), contiguous.back().nbytes());
  }
  const auto& first = contiguous.front();
  cuda::DenseOptions options;
  options.float64_work = wishes.float64_work;
  options.tol = tol;
  options.seed = static_cast<uint64_t>(seed);
  options.temporary_bytes = wishes.temporary_bytes;
  const int64_t itemsize = wishes.float64_work || first.scalar_type() == at::kDouble ? 8 : 4;
  const auto plan =
      core::plan_svd(first.size(0), first.size(1), rank, itemsize, first.element_size(), method, {true, 1});
  const std::vector<uint64_t> unsigned_keys(keys.begin(), keys.end());
  static StandinMemory memory;
  cuda::Context& context = cuda::context(standins::stream(), memory);
  const auto found = plan.method == core::SvdMethod::kLanczos
                         ? lanczos_launch(contiguous, plan, options, unsigned_keys, wishes.max_passes, context)
                         : gram_launch(contiguous, plan, options, unsigned_keys, context);
  std::vector<at::Tensor> u, s, v, residuals;
  const int64_t count = static_cast<int64_t>(found.size());
  const auto host = at::TensorOptions().dtype(at::kLong);
  auto converged = at::zeros({count}, host.dtype(at::kBool)), passes = at::zeros({count}, host);
  auto columns = at::zeros({count}, host);
  auto floors = at::zeros({count}, host.dtype(at::kDouble));
  for (size_t i = 0; i < found.size(); ++i) {
    u.push_back(found[i].u), s.push_back(found[i].s), v.push_back(found[i].v);
    residuals.push_back(found[i].residuals);
    converged.mutable_data_ptr<bool>()[i] = found[i].converged;
    passes.mutable_data_ptr<int64_t>()[i] = found[i].passes;
    columns.mutable_data_ptr<int64_t>()[i] = found[i].columns;
    floors.mutable_data_ptr<double>()[i] = found[i].floor;
  }
  return {at::stack(u), at::stack(s), at::stack(v), at::stack(residuals), converged, passes, columns, floors};
}

Output svd_emulated(at::TensorList weights, int64_t rank, double tol, int64_t seed, at::IntArrayRef keys,
                    std::string method, bool float64_work, int64_t temporary_bytes, int64_t max_passes) {
  return decompose(weights, rank, tol, seed, keys, method, {float64_work, temporary_bytes, max_passes});
}

// weight: a number of core::WeightType. Products and terms.
std::tuple<int64_t, int64_t> precision(int64_t weight, bool float64_work, double tol, int64_t capability, bool exact) {
  const auto type = static_cast<core::WeightType>(weight);
  const auto chosen = exact ? core::exact_precision(type, float64_work, static_cast<int>(capability))
                            : core::iteration_precision(type, float64_work, tol, static_cast<int>(capability));
  return {static_cast<int64_t>(chosen.products), chosen.terms};
}

}  // namespace

// U, S, V, residuals, converged, passes, columns, floors.
TORCH_LIBRARY_FRAGMENT(osora_emulated, m) {
  m.def(
      "svd(Tensor[] weights, int rank, float tol, int seed, int[] keys, str method='lanczos', bool float64_work=False, "
      "int temporary_bytes=134217728, int max_passes=600)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_FRAGMENT(osora_emulated, m) {
  m.def("svd_precision(int weight, bool float64_work, float tol, int capability, bool exact) -> (int, int)",
        &precision);
  // Compiled against and loaded, of cuBLAS and of cuSOLVER.
  m.def("library_versions() -> str[]", []() -> std::vector<std::string> {
    const auto blas = cuda::cublas_versions(), solver = cuda::cusolver_versions();
    return {blas.compiled, blas.loaded, solver.compiled, solver.loaded};
  });
}
TORCH_LIBRARY_FRAGMENT(osora_emulated, m) {
  m.def("frobenius_norms(Tensor[] weights) -> float[]",
        [](at::TensorList weights) { return frobenius_norms(weights.vec()); });
}
TORCH_LIBRARY_IMPL(osora_emulated, CPU, m) { m.impl("svd", &svd_emulated); }

}  // namespace osora
