// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <limits>

#include "cuda/svd/dense_cuda.h"

namespace osora::cuda {
namespace {

// More matrices at once make XsyevBatched fail, though no manual says so.
constexpr int64_t kLargestBatch = 32768;
// Its workspace may be many times its input: then in smaller portions.
constexpr size_t kWorkspaceBytes = size_t{1} << 30;

cudaDataType data_type(Type type) { return type == Type::kFloat64 ? CUDA_R_64F : CUDA_R_32F; }

struct Problem {
  cudaDataType type;
  int64_t n;
  void* a;
  void* w;
  int* info;
};

Problem problem(const Matrices& a, void* w, int* info, int64_t b) {
  return {data_type(a.type), a.rows, a.at(b), static_cast<char*>(w) + b * a.rows * size_of(a.type), info + b};
}

struct Workspace {
  size_t device = 0, host = 0;
};

}  // namespace

void symmetric_eigenvectors_one(const Context& context, const Matrices& a, void* w, int* info) {
  for (int64_t b = 0; b < a.batch; ++b) {
    const Problem p = problem(a, w, info, b);
    Workspace size;
    check(cusolverDnXsyevd_bufferSize(context.solver, context.params, CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_LOWER,
                                      p.n, p.type, p.a, p.n, p.type, p.w, p.type, &size.device, &size.host),
          "cusolverDnXsyevd_bufferSize");
    const auto device = context.memory->allocate(size.device);
    std::vector<char> host(size.host);
    check(
        cusolverDnXsyevd(context.solver, context.params, CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_LOWER, p.n, p.type,
                         p.a, p.n, p.type, p.w, p.type, device.get(), size.device, host.data(), size.host, p.info),
        "cusolverDnXsyevd");
  }
}

void symmetric_eigenvectors(const Context& context, const Matrices& a, void* w, int* info) {
#if CUSOLVER_VERSION >= 11701
  if (has_batched_eigen()) {
    const int64_t most = std::clamp<int64_t>(std::numeric_limits<int32_t>::max() / (a.rows * a.rows), 1, kLargestBatch);
    for (int64_t begin = 0, count = 0; begin < a.batch; begin += count) {
      const Problem p = problem(a, w, info, begin);
      Workspace size;
      const auto too_large = [&] {
        check(cusolverDnXsyevBatched_bufferSize(context.solver, context.params, CUSOLVER_EIG_MODE_VECTOR,
                                                CUBLAS_FILL_MODE_LOWER, p.n, p.type, p.a, p.n, p.type, p.w, p.type,
                                                &size.device, &size.host, count),
              "cusolverDnXsyevBatched_bufferSize");
        return size.device > kWorkspaceBytes && count > 1;
      };
      count = std::min(most, a.batch - begin);
      while (too_large()) count /= 2;
      const auto device = context.memory->allocate(size.device);
      std::vector<char> host(size.host);
      // cuSOLVER before 11.7.3 gives wrong vectors, silently, from a workspace that is not zero (pytorch#192483).
      if (solver_version() < 11703) {
        check(cudaMemsetAsync(device.get(), 0, size.device, context.stream), "cudaMemsetAsync");
      }
      check(cusolverDnXsyevBatched(context.solver, context.params, CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_LOWER,
                                   p.n, p.type, p.a, p.n, p.type, p.w, p.type, device.get(), size.device, host.data(),
                                   size.host, p.info, count),
            "cusolverDnXsyevBatched");
    }
    return;
  }
#endif
  symmetric_eigenvectors_one(context, a, w, info);
}

}  // namespace osora::cuda
