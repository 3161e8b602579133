// SPDX-License-Identifier: Apache-2.0
// cuSOLVER: symmetric eigenproblems and Cholesky factors.
#include <ATen/Functions.h>

#include "cusolver.h"

namespace osora::standins {
namespace {

constexpr int kFirstWithBatchedEigen = 11701;
constexpr int kFirstWithoutNeedOfZeros = 11703;  // pytorch#192483
constexpr int64_t kLargestBatch = 32768;         // undocumented; larger ones have been seen to fail

// A [batch, n, n] with stride ld * n, W [batch, n] with stride n.
struct Eigen {
  cusolverEigMode_t jobz;
  cublasFillMode_t uplo;
  int64_t n;
  cudaDataType type_a;
  const void* a;
  int64_t ld;
  cudaDataType type_w;
  const void* w;
  cudaDataType compute;
  int64_t batch = 1;

  Matrix A() const { return {"A", a, type_a, n, n, ld, batch, n * ld}; }
  Matrix W() const { return {"W", w, type_w, n, 1, std::max<int64_t>(1, n), batch, n}; }
};

// Everything but the pointers; its result names what the workspace size may depend on.
std::string check(const char* routine, cusolverDnHandle_t handle, cusolverDnParams_t params, const Eigen& e) {
  need_solver(handle);
  need_params(params);
  need(e.jobz == CUSOLVER_EIG_MODE_VECTOR || e.jobz == CUSOLVER_EIG_MODE_NOVECTOR, "jobz is ", e.jobz);
  need(e.uplo == CUBLAS_FILL_MODE_LOWER || e.uplo == CUBLAS_FILL_MODE_UPPER, "uplo is ", e.uplo);
  need(e.n >= 0 && e.batch >= 1, "n is ", e.n, ", the batch ", e.batch);
  need(e.ld >= std::max<int64_t>(1, e.n), "A has ", e.n, " rows and leading dimension ", e.ld);
  need_types({e.type_a, e.type_w, e.compute});
  return text(routine, " jobz ", e.jobz, " uplo ", e.uplo, " n ", e.n, " ld ", e.ld, " ", name_of(e.type_a), " batch ",
              e.batch, " algorithm ", params->batched_eigen, " mode ", handle->mode);
}

std::string check_batched(cusolverDnHandle_t handle, cusolverDnParams_t params, const Eigen& e) {
  need_or(CUSOLVER_STATUS_NOT_SUPPORTED, settings().cusolver_version >= kFirstWithBatchedEigen,
          "this cuSOLVER has no XsyevBatched");
  const std::string parameters = check("XsyevBatched", handle, params, e);
  need(e.n == 0 || e.ld <= kInt32Max / e.n / e.batch, "n * lda * batchSize is more than INT32_MAX");
  need(e.batch <= kLargestBatch, "a batch of ", e.batch, " is too large");
  need(params->batched_eigen == CUSOLVER_ALG_1, "the algorithm is not CUSOLVER_ALG_1, the same for all sizes");
  return parameters;
}

void remember(const std::string& parameters, const Eigen& e, size_t* device, size_t* host) {
  need(device && host, "the place for a workspace size is null");
  WorkspaceSize size = workspace_size(2 * e.batch * e.n * (e.n + 5), bytes_of(e.type_a));
  if (e.batch > settings().cheap_batch) size.device += size_t{4} << 30;
  remember_query(parameters, size);
  *device = size.device;
  *host = size.host;
}

void solve(const Call& call, const std::string& parameters, const Eigen& e, const Workspace& workspace, int* info,
           bool zeroed) {
  const Matrix A = e.A(), W = e.W(), flags{"info", info, CUDA_R_32I, e.batch, 1, e.batch};
  need_device(A);
  need_device(W);
  need_info(info, e.batch);
  need_disjoint({A, W, flags}, {});
  use_workspace(parameters, workspace, {A, W, flags}, zeroed);
  const char* const triangle = e.uplo == CUBLAS_FILL_MODE_LOWER ? "L" : "U";
  for (int64_t k = 0; k < e.batch; ++k) {
    at::Tensor a = view(A, k);
    const at::Tensor used = *triangle == 'L' ? a.tril() : a.triu();
    const bool finite = at::isfinite(used).all().item<bool>();
    if (finite) {
      const auto [values, vectors] = at::linalg_eigh(used, triangle);
      view(W, k).select(1, 0).copy_(values);
      if (e.jobz == CUSOLVER_EIG_MODE_VECTOR) {
        a.copy_(vectors);
      } else {
        fill_nan(A, k);
      }
    }
    write_info(call, info, k, finite ? 0 : 1, {A, W});
  }
}

// The other triangle stays as it is. A matrix that is not positive definite has no factor: its triangle becomes NaN.
template <class T>
cusolverStatus_t potrf(const char* name, cusolverDnHandle_t handle, cublasFillMode_t uplo, int n, T** a, int ld,
                       int* info, int batch) {
  return run_solver(name, [&](const Call& call) {
    need_solver(handle);
    need(uplo == CUBLAS_FILL_MODE_LOWER || uplo == CUBLAS_FILL_MODE_UPPER, "uplo is ", uplo);
    const cudaDataType type = sizeof(T) == 8 ? CUDA_R_64F : CUDA_R_32F;
    const int64_t count = batch;
    const auto A = matrices_at("A", reinterpret_cast<const void* const*>(a), count, {"A", nullptr, type, n, n, ld});
    need_info(info, count);
    std::vector<Matrix> written = A;
    written.push_back({"info", info, CUDA_R_32I, count, 1, std::max<int64_t>(1, count)});
    need_disjoint(written, {{"the array A", a, CUDA_R_8U, count * 8, 1, std::max<int64_t>(1, count * 8)}});
    const bool upper = uplo == CUBLAS_FILL_MODE_UPPER;
    for (int64_t k = 0; k < count; ++k) {
      at::Tensor out = view(A[k]);
      const at::Tensor other = upper ? out.tril(-1) : out.triu(1);
      const at::Tensor used = upper ? out.triu().t().contiguous() : out.tril();
      const auto [factor, flag] = at::linalg_cholesky_ex(used);
      info[k] = call.info(k, flag.item<int>());
      const at::Tensor result = upper ? factor.t() : factor;
      out.copy_(info[k] == 0 ? result : at::full_like(result, NAN));
      const at::Tensor where = at::ones_like(out, at::TensorOptions().dtype(at::kBool));
      out.copy_(at::where(upper ? where.tril(-1) : where.triu(1), other, out));
    }
  });
}

}  // namespace
}  // namespace osora::standins

using namespace osora::standins;

extern "C" {

cusolverStatus_t cusolverDnXsyevBatched_bufferSize(cusolverDnHandle_t handle, cusolverDnParams_t params,
                                                   cusolverEigMode_t jobz, cublasFillMode_t uplo, int64_t n,
                                                   cudaDataType type_a, const void* a, int64_t ld, cudaDataType type_w,
                                                   const void* w, cudaDataType compute, size_t* device, size_t* host,
                                                   int64_t batch) {
  return run_solver("cusolverDnXsyevBatched_bufferSize", [&](const Call&) {
    const Eigen e{jobz, uplo, n, type_a, a, ld, type_w, w, compute, batch};
    remember(check_batched(handle, params, e), e, device, host);
  });
}

cusolverStatus_t cusolverDnXsyevBatched(cusolverDnHandle_t handle, cusolverDnParams_t params, cusolverEigMode_t jobz,
                                        cublasFillMode_t uplo, int64_t n, cudaDataType type_a, void* a, int64_t ld,
                                        cudaDataType type_w, void* w, cudaDataType compute, void* device,
                                        size_t device_bytes, void* host, size_t host_bytes, int* info, int64_t batch) {
  return run_solver("cusolverDnXsyevBatched", [&](const Call& call) {
    const Eigen e{jobz, uplo, n, type_a, a, ld, type_w, w, compute, batch};
    solve(call, check_batched(handle, params, e), e, {device, device_bytes, host, host_bytes}, info,
          /*zeroed=*/settings().cusolver_version < kFirstWithoutNeedOfZeros);
  });
}

cusolverStatus_t cusolverDnXsyevd_bufferSize(cusolverDnHandle_t handle, cusolverDnParams_t params,
                                             cusolverEigMode_t jobz, cublasFillMode_t uplo, int64_t n,
                                             cudaDataType type_a, const void* a, int64_t ld, cudaDataType type_w,
                                             const void* w, cudaDataType compute, size_t* device, size_t* host) {
  return run_solver("cusolverDnXsyevd_bufferSize", [&](const Call&) {
    const Eigen e{jobz, uplo, n, type_a, a, ld, type_w, w, compute};
    remember(check("Xsyevd", handle, params, e), e, device, host);
  });
}

cusolverStatus_t cusolverDnXsyevd(cusolverDnHandle_t handle, cusolverDnParams_t params, cusolverEigMode_t jobz,
                                  cublasFillMode_t uplo, int64_t n, cudaDataType type_a, void* a, int64_t ld,
                                  cudaDataType type_w, void* w, cudaDataType compute, void* device, size_t device_bytes,
                                  void* host, size_t host_bytes, int* info) {
  return run_solver("cusolverDnXsyevd", [&](const Call& call) {
    const Eigen e{jobz, uplo, n, type_a, a, ld, type_w, w, compute};
    solve(call, check("Xsyevd", handle, params, e), e, {device, device_bytes, host, host_bytes}, info, false);
  });
}

cusolverStatus_t cusolverDnSpotrfBatched(cusolverDnHandle_t handle, cublasFillMode_t uplo, int n, float* a[], int ld,
                                         int* info, int batch) {
  return potrf("cusolverDnSpotrfBatched", handle, uplo, n, a, ld, info, batch);
}
cusolverStatus_t cusolverDnDpotrfBatched(cusolverDnHandle_t handle, cublasFillMode_t uplo, int n, double* a[], int ld,
                                         int* info, int batch) {
  return potrf("cusolverDnDpotrfBatched", handle, uplo, n, a, ld, info, batch);
}

}  // extern "C"
