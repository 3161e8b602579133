// SPDX-License-Identifier: Apache-2.0
// cuSOLVER's older interface, sizes in int and workspaces in numbers: gesvdj (V) and gesvdaStridedBatched (V, m >= n).
#include <ATen/Functions.h>

#include "cusolver_svd.h"
#include "memory.h"

namespace osora::standins {
namespace {

template <class T>
constexpr cudaDataType kType = sizeof(T) == 8 ? CUDA_R_64F : CUDA_R_32F;

template <class T>
Svd gesvdj(cusolverEigMode_t jobz, int econ, int m, int n, const T* a, int lda, const T* s, const T* u, int ldu,
           const T* v, int ldv, gesvdjInfo_t params) {
  need(is_object(params, kJacobi), params, " are no live ", kJacobi);
  need(econ == 0 || econ == 1, "econ is ", econ);
  need(int64_t{lda} * n <= kInt32Max, "lda * n is more than INT32_MAX");
  const int64_t count = std::min(m, n);
  const bool wanted = jobz == CUSOLVER_EIG_MODE_VECTOR;
  return {text("gesvdj jobz ", jobz, " econ ", econ, " tolerance ", params->tolerance, " sweeps ", params->max_sweeps),
          {"A", a, kType<T>, m, n, lda},
          {"S", s, kType<T>, count, 1, std::max<int64_t>(1, count)},
          {"U", u, kType<T>, wanted ? m : 0, wanted ? econ ? count : m : 0, ldu},
          {"V", v, kType<T>, wanted ? n : 0, wanted ? econ ? count : n : 0, ldv}};
}

template <class T>
struct Strided {
  const T* data;
  int ld;
  long long stride;
};

template <class T>
Svd gesvda(cusolverEigMode_t jobz, int rank, int m, int n, const Strided<T>& a, const Strided<T>& s,
           const Strided<T>& u, const Strided<T>& v, int batch) {
  need(m >= n, "gesvda needs m >= n, got ", m, " x ", n);
  need(rank >= 1 && rank <= n, "rank is ", rank, ", n is ", n);
  need(batch >= 1, "a batch of ", batch);
  const bool wanted = jobz == CUSOLVER_EIG_MODE_VECTOR;
  for (const Strided<T>* each : {&a, &s, &u, &v})
    need(each->stride <= kInt32Max / batch, "batchSize * stride is more than INT32_MAX");
  Svd svd{text("gesvda jobz ", jobz, " rank ", rank, " batch ", batch, " strides ", a.stride, ", ", s.stride, ", ",
               u.stride, ", ", v.stride),
          {"A", a.data, kType<T>, m, n, a.ld, batch, a.stride},
          {"S", s.data, kType<T>, rank, 1, rank, batch, s.stride},
          {"U", u.data, kType<T>, wanted ? m : 0, wanted ? rank : 0, u.ld, batch, u.stride},
          {"V", v.data, kType<T>, wanted ? n : 0, wanted ? rank : 0, v.ld, batch, v.stride}};
  svd.destroys = false;
  return svd;
}

template <class T>
Workspace in_numbers(T* work, int lwork) {
  need(lwork >= 0, "lwork is ", lwork);
  return {work, static_cast<size_t>(lwork) * sizeof(T), nullptr, 0};
}

// rank = n: the Frobenius norm of A - U S V^T. Else: how far U is from having orthonormal columns.
void write_residuals(const Svd& svd, bool is_whole, double* residuals) {
  for (int64_t k = 0; k < svd.A.batch; ++k) {
    const at::Tensor U = view(svd.U, k).to(at::kDouble), S = view(svd.S, k).select(1, 0).to(at::kDouble);
    const at::Tensor Vt = view(svd.V, k).to(at::kDouble).t();
    const at::Tensor rest = is_whole ? view(svd.A, k).to(at::kDouble).sub(at::mm(U.mul(S), Vt))
                                     : at::mm(U.t(), U).sub(at::eye(U.size(1), U.options()));
    residuals[k] = rest.norm().item<double>();
  }
}

}  // namespace
}  // namespace osora::standins

using namespace osora::standins;

extern "C" {

cusolverStatus_t cusolverDnSgesvdj_bufferSize(cusolverDnHandle_t handle, cusolverEigMode_t jobz, int econ, int m, int n,
                                              const float* a, int lda, const float* s, const float* u, int ldu,
                                              const float* v, int ldv, int* lwork, gesvdjInfo_t params) {
  return run_solver("cusolverDnSgesvdj_bufferSize", [&](const Call&) {
    remember_svd(handle, gesvdj(jobz, econ, m, n, a, lda, s, u, ldu, v, ldv, params), lwork);
  });
}

cusolverStatus_t cusolverDnSgesvdj(cusolverDnHandle_t handle, cusolverEigMode_t jobz, int econ, int m, int n, float* a,
                                   int lda, float* s, float* u, int ldu, float* v, int ldv, float* work, int lwork,
                                   int* info, gesvdjInfo_t params) {
  return run_solver("cusolverDnSgesvdj", [&](const Call& call) {
    solve_svd(call, handle, gesvdj<float>(jobz, econ, m, n, a, lda, s, u, ldu, v, ldv, params), in_numbers(work, lwork),
              info, std::max(m, n));
  });
}

cusolverStatus_t cusolverDnSgesvdaStridedBatched_bufferSize(cusolverDnHandle_t handle, cusolverEigMode_t jobz, int rank,
                                                            int m, int n, const float* a, int lda, long long stride_a,
                                                            const float* s, long long stride_s, const float* u, int ldu,
                                                            long long stride_u, const float* v, int ldv,
                                                            long long stride_v, int* lwork, int batch) {
  return run_solver("cusolverDnSgesvdaStridedBatched_bufferSize", [&](const Call&) {
    remember_svd(handle,
                 gesvda<float>(jobz, rank, m, n, {a, lda, stride_a}, {s, rank, stride_s}, {u, ldu, stride_u},
                               {v, ldv, stride_v}, batch),
                 lwork);
  });
}

cusolverStatus_t cusolverDnSgesvdaStridedBatched(cusolverDnHandle_t handle, cusolverEigMode_t jobz, int rank, int m,
                                                 int n, const float* a, int lda, long long stride_a, float* s,
                                                 long long stride_s, float* u, int ldu, long long stride_u, float* v,
                                                 int ldv, long long stride_v, float* work, int lwork, int* info,
                                                 double* residuals, int batch) {
  return run_solver("cusolverDnSgesvdaStridedBatched", [&](const Call& call) {
    const Svd svd = gesvda<float>(jobz, rank, m, n, {a, lda, stride_a}, {s, rank, stride_s}, {u, ldu, stride_u},
                                  {v, ldv, stride_v}, batch);
    need(!residuals || !is_device(residuals), "h_R_nrmF is device memory");
    need(!residuals || !settings().capturing, "h_R_nrmF reaches the host while a graph is being captured");
    solve_svd(call, handle, svd, in_numbers(work, lwork), info, rank);
    if (!residuals) return;
    count_host_wait();
    write_residuals(svd, rank == n, residuals);
  });
}

cusolverStatus_t cusolverDnDgesvdj_bufferSize(cusolverDnHandle_t handle, cusolverEigMode_t jobz, int econ, int m, int n,
                                              const double* a, int lda, const double* s, const double* u, int ldu,
                                              const double* v, int ldv, int* lwork, gesvdjInfo_t params) {
  return run_solver("cusolverDnDgesvdj_bufferSize", [&](const Call&) {
    remember_svd(handle, gesvdj(jobz, econ, m, n, a, lda, s, u, ldu, v, ldv, params), lwork);
  });
}

cusolverStatus_t cusolverDnDgesvdj(cusolverDnHandle_t handle, cusolverEigMode_t jobz, int econ, int m, int n, double* a,
                                   int lda, double* s, double* u, int ldu, double* v, int ldv, double* work, int lwork,
                                   int* info, gesvdjInfo_t params) {
  return run_solver("cusolverDnDgesvdj", [&](const Call& call) {
    solve_svd(call, handle, gesvdj<double>(jobz, econ, m, n, a, lda, s, u, ldu, v, ldv, params),
              in_numbers(work, lwork), info, std::max(m, n));
  });
}

cusolverStatus_t cusolverDnDgesvdaStridedBatched_bufferSize(cusolverDnHandle_t handle, cusolverEigMode_t jobz, int rank,
                                                            int m, int n, const double* a, int lda, long long stride_a,
                                                            const double* s, long long stride_s, const double* u,
                                                            int ldu, long long stride_u, const double* v, int ldv,
                                                            long long stride_v, int* lwork, int batch) {
  return run_solver("cusolverDnDgesvdaStridedBatched_bufferSize", [&](const Call&) {
    remember_svd(handle,
                 gesvda<double>(jobz, rank, m, n, {a, lda, stride_a}, {s, rank, stride_s}, {u, ldu, stride_u},
                                {v, ldv, stride_v}, batch),
                 lwork);
  });
}

cusolverStatus_t cusolverDnDgesvdaStridedBatched(cusolverDnHandle_t handle, cusolverEigMode_t jobz, int rank, int m,
                                                 int n, const double* a, int lda, long long stride_a, double* s,
                                                 long long stride_s, double* u, int ldu, long long stride_u, double* v,
                                                 int ldv, long long stride_v, double* work, int lwork, int* info,
                                                 double* residuals, int batch) {
  return run_solver("cusolverDnDgesvdaStridedBatched", [&](const Call& call) {
    const Svd svd = gesvda<double>(jobz, rank, m, n, {a, lda, stride_a}, {s, rank, stride_s}, {u, ldu, stride_u},
                                   {v, ldv, stride_v}, batch);
    need(!residuals || !is_device(residuals), "h_R_nrmF is device memory");
    need(!residuals || !settings().capturing, "h_R_nrmF reaches the host while a graph is being captured");
    solve_svd(call, handle, svd, in_numbers(work, lwork), info, rank);
    if (!residuals) return;
    count_host_wait();
    write_residuals(svd, rank == n, residuals);
  });
}

}  // extern "C"
