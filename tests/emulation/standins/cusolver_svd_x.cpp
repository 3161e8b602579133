// SPDX-License-Identifier: Apache-2.0
// cuSOLVER: Xgesvd (V^T, m >= n), Xgesvdp (V), Xgesvdr (V, leading part only).
#include "cusolver_svd.h"
#include "memory.h"

namespace osora::standins {
namespace {

struct Arrays {
  cudaDataType type_a;
  const void* a;
  int64_t lda;
  cudaDataType type_s;
  const void* s;
  cudaDataType type_u;
  const void* u;
  int64_t ldu;
  cudaDataType type_v;
  const void* v;
  int64_t ldv;
  cudaDataType compute;
};

// U [u_rows, u_columns] and V [v_rows, v_columns]; an array that is not wanted has no columns.
Svd make_svd(std::string routine, const Arrays& x, int64_t m, int64_t n, std::pair<int64_t, int64_t> u,
             std::pair<int64_t, int64_t> v) {
  need_types({x.compute, x.type_a, x.type_s, x.type_u, x.type_v});
  const int64_t count = std::min(m, n);
  return {std::move(routine),
          {"A", x.a, x.type_a, m, n, x.lda},
          {"S", x.s, x.type_s, count, 1, std::max<int64_t>(1, count)},
          {"U", x.u, x.type_u, u.first, u.second, x.ldu},
          {"V", x.v, x.type_v, v.first, v.second, x.ldv}};
}

Svd gesvd(cusolverDnParams_t params, signed char jobu, signed char jobvt, int64_t m, int64_t n, const Arrays& x) {
  need_params(params);
  need(m >= n, "Xgesvd needs m >= n, got ", m, " x ", n);
  for (const signed char job : {jobu, jobvt})
    need(job == 'A' || job == 'S' || job == 'N', "job ", job, " is not modelled");
  const int64_t u = jobu == 'A' ? m : jobu == 'S' ? n : 0, vt = jobvt == 'N' ? 0 : n;
  Svd svd = make_svd(text("Xgesvd ", jobu, jobvt), x, m, n, {u ? m : 0, u}, {vt, vt});
  svd.transposed = true;
  return svd;
}

Svd gesvdp(cusolverDnParams_t params, cusolverEigMode_t jobz, int econ, int64_t m, int64_t n, const Arrays& x) {
  need_params(params);
  need(econ == 0 || econ == 1, "econ is ", econ);
  // Even where no vectors are wanted the real call refuses null pointers and ld < 1.
  need(jobz == CUSOLVER_EIG_MODE_VECTOR || (x.u && x.v), "U or V is null");
  const bool wanted = jobz == CUSOLVER_EIG_MODE_VECTOR;
  const int64_t count = std::min(m, n);
  return make_svd(text("Xgesvdp jobz ", jobz, " econ ", econ), x, m, n, {wanted ? m : 0, wanted ? econ ? count : m : 0},
                  {wanted ? n : 0, wanted ? econ ? count : n : 0});
}

// NVIDIA's sample allocates all of U [m, m], V [n, n], S [min(m, n)]; so must we.
Svd gesvdr(cusolverDnParams_t params, signed char jobu, signed char jobv, int64_t m, int64_t n, int64_t k, int64_t p,
           int64_t niters, const Arrays& x) {
  need_params(params);
  for (const signed char job : {jobu, jobv}) need(job == 'S' || job == 'N', "job ", job, " is not modelled");
  need(k >= 1 && p >= 0 && niters >= 0, "k is ", k, ", p ", p, ", niters ", niters);
  need(k + p < std::min(m, n), "k + p = ", k + p, " is not less than min(m, n) = ", std::min(m, n));
  return make_svd(text("Xgesvdr ", jobu, jobv, " k ", k, " p ", p, " niters ", niters), x, m, n,
                  {jobu == 'S' ? m : 0, jobu == 'S' ? m : 0}, {jobv == 'S' ? n : 0, jobv == 'S' ? n : 0});
}

}  // namespace
}  // namespace osora::standins

using namespace osora::standins;

extern "C" {

cusolverStatus_t cusolverDnXgesvd_bufferSize(cusolverDnHandle_t handle, cusolverDnParams_t params, signed char jobu,
                                             signed char jobvt, int64_t m, int64_t n, cudaDataType type_a,
                                             const void* a, int64_t lda, cudaDataType type_s, const void* s,
                                             cudaDataType type_u, const void* u, int64_t ldu, cudaDataType type_vt,
                                             const void* vt, int64_t ldvt, cudaDataType compute, size_t* device,
                                             size_t* host) {
  return run_solver("cusolverDnXgesvd_bufferSize", [&](const Call&) {
    const Arrays x{type_a, a, lda, type_s, s, type_u, u, ldu, type_vt, vt, ldvt, compute};
    remember_svd(handle, gesvd(params, jobu, jobvt, m, n, x), device, host);
  });
}

cusolverStatus_t cusolverDnXgesvd(cusolverDnHandle_t handle, cusolverDnParams_t params, signed char jobu,
                                  signed char jobvt, int64_t m, int64_t n, cudaDataType type_a, void* a, int64_t lda,
                                  cudaDataType type_s, void* s, cudaDataType type_u, void* u, int64_t ldu,
                                  cudaDataType type_vt, void* vt, int64_t ldvt, cudaDataType compute, void* device,
                                  size_t device_bytes, void* host, size_t host_bytes, int* info) {
  return run_solver("cusolverDnXgesvd", [&](const Call& call) {
    const Arrays x{type_a, a, lda, type_s, s, type_u, u, ldu, type_vt, vt, ldvt, compute};
    solve_svd(call, handle, gesvd(params, jobu, jobvt, m, n, x), {device, device_bytes, host, host_bytes}, info, m);
  });
}

cusolverStatus_t cusolverDnXgesvdp_bufferSize(cusolverDnHandle_t handle, cusolverDnParams_t params,
                                              cusolverEigMode_t jobz, int econ, int64_t m, int64_t n,
                                              cudaDataType type_a, const void* a, int64_t lda, cudaDataType type_s,
                                              const void* s, cudaDataType type_u, const void* u, int64_t ldu,
                                              cudaDataType type_v, const void* v, int64_t ldv, cudaDataType compute,
                                              size_t* device, size_t* host) {
  return run_solver("cusolverDnXgesvdp_bufferSize", [&](const Call&) {
    const Arrays x{type_a, a, lda, type_s, s, type_u, u, ldu, type_v, v, ldv, compute};
    remember_svd(handle, gesvdp(params, jobz, econ, m, n, x), device, host);
  });
}

cusolverStatus_t cusolverDnXgesvdp(cusolverDnHandle_t handle, cusolverDnParams_t params, cusolverEigMode_t jobz,
                                   int econ, int64_t m, int64_t n, cudaDataType type_a, void* a, int64_t lda,
                                   cudaDataType type_s, void* s, cudaDataType type_u, void* u, int64_t ldu,
                                   cudaDataType type_v, void* v, int64_t ldv, cudaDataType compute, void* device,
                                   size_t device_bytes, void* host, size_t host_bytes, int* info, double* err_sigma) {
  return run_solver("cusolverDnXgesvdp", [&](const Call& call) {
    const Arrays x{type_a, a, lda, type_s, s, type_u, u, ldu, type_v, v, ldv, compute};
    const Svd svd = gesvdp(params, jobz, econ, m, n, x);
    need(err_sigma, "h_err_sigma is null");
    need(!is_device(err_sigma), "h_err_sigma is device memory");
    need(!settings().capturing, "h_err_sigma reaches the host while a graph is being captured");
    solve_svd(call, handle, svd, {device, device_bytes, host, host_bytes}, info, std::max(m, n));
    count_host_wait();
    *err_sigma = 0;
  });
}

cusolverStatus_t cusolverDnXgesvdr_bufferSize(cusolverDnHandle_t handle, cusolverDnParams_t params, signed char jobu,
                                              signed char jobv, int64_t m, int64_t n, int64_t k, int64_t p,
                                              int64_t niters, cudaDataType type_a, const void* a, int64_t lda,
                                              cudaDataType type_s, const void* s, cudaDataType type_u, const void* u,
                                              int64_t ldu, cudaDataType type_v, const void* v, int64_t ldv,
                                              cudaDataType compute, size_t* device, size_t* host) {
  return run_solver("cusolverDnXgesvdr_bufferSize", [&](const Call&) {
    const Arrays x{type_a, a, lda, type_s, s, type_u, u, ldu, type_v, v, ldv, compute};
    remember_svd(handle, gesvdr(params, jobu, jobv, m, n, k, p, niters, x), device, host);
  });
}

cusolverStatus_t cusolverDnXgesvdr(cusolverDnHandle_t handle, cusolverDnParams_t params, signed char jobu,
                                   signed char jobv, int64_t m, int64_t n, int64_t k, int64_t p, int64_t niters,
                                   cudaDataType type_a, void* a, int64_t lda, cudaDataType type_s, void* s,
                                   cudaDataType type_u, void* u, int64_t ldu, cudaDataType type_v, void* v, int64_t ldv,
                                   cudaDataType compute, void* device, size_t device_bytes, void* host,
                                   size_t host_bytes, int* info) {
  return run_solver("cusolverDnXgesvdr", [&](const Call& call) {
    const Arrays x{type_a, a, lda, type_s, s, type_u, u, ldu, type_v, v, ldv, compute};
    solve_svd(call, handle, gesvdr(params, jobu, jobv, m, n, k, p, niters, x), {device, device_bytes, host, host_bytes},
              info, k);
  });
}

}  // extern "C"
