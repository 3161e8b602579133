// SPDX-License-Identifier: Apache-2.0
// Calls with one wrong argument each. tests/project/test_standins.py knows what each must be refused with.
#include "self_test.h"

namespace osora::standins {
namespace {

constexpr auto kVector = CUSOLVER_EIG_MODE_VECTOR;
constexpr auto kLower = CUBLAS_FILL_MODE_LOWER;

// A right product of two batches of 4 x 4 matrices; each case changes one thing.
struct Gemm {
  Handles h;
  Device A{at::kFloat, 4, 4, 4, 2}, B{at::kFloat, 4, 4, 4, 2}, C{at::kFloat, 4, 4, 4, 2};
  float one = 1, zero = 0;
  const float *alpha = &one, *beta = &zero;
  cublasHandle_t blas = h.blas;
  const void *a = A.data(), *b = B.data();
  void* c = C.data();
  cudaDataType type_a = CUDA_R_32F, type_b = CUDA_R_32F, type_c = CUDA_R_32F;
  int m = 4, lda = 4, ldb = 4, ldc = 4, batch = 2;
  long long stride_a = 16, stride_c = 16;
  cublasComputeType_t compute = CUBLAS_COMPUTE_32F;
  int run() const {
    return cublasGemmStridedBatchedEx(blas, CUBLAS_OP_N, CUBLAS_OP_N, m, 4, 4, alpha, a, type_a, lda, stride_a, b,
                                      type_b, ldb, 16, beta, c, type_c, ldc, stride_c, batch, compute,
                                      CUBLAS_GEMM_DEFAULT);
  }
};
Case gemm(const std::string& name, const std::function<void(Gemm&)>& change) {
  return {"gemm-" + name, [=] {
            Gemm call;
            change(call);
            return call.run();
          }};
}

std::vector<Case> gemm_cases() {
  return {
      gemm("short-ld", [](Gemm& g) { g.lda = 3; }),
      gemm("short-ldc", [](Gemm& g) { g.ldc = 3; }),
      gemm("negative-size", [](Gemm& g) { g.m = -1; }),
      gemm("ld-beyond-allocation", [](Gemm& g) { g.ldb = 5; }),
      gemm("stride-beyond-allocation", [](Gemm& g) { g.stride_a = 17; }),
      gemm("batch-beyond-allocation", [](Gemm& g) { g.batch = 3; }),
      gemm("host-pointer", [](Gemm& g) { g.a = &g.one; }),
      gemm("null-pointer", [](Gemm& g) { g.b = nullptr; }),
      gemm("null-alpha", [](Gemm& g) { g.alpha = nullptr; }),
      gemm("device-beta", [](Gemm& g) { g.beta = g.B.data(); }),
      gemm("misaligned", [](Gemm& g) { g.a = g.A.data<char>() + 2; }),
      gemm("misaligned-bfloat16",
           [](Gemm& g) {
             g.type_a = g.type_b = CUDA_R_16BF;
             g.a = g.A.data<char>() + 2;
           }),
      gemm("mixed-types", [](Gemm& g) { g.type_a = CUDA_R_16BF; }),
      gemm("bfloat16-to-float16",
           [](Gemm& g) {
             g.type_a = g.type_b = CUDA_R_16BF;
             g.type_c = CUDA_R_16F;
           }),
      gemm("tf32-of-bfloat16",
           [](Gemm& g) {
             g.type_a = g.type_b = CUDA_R_16BF;
             g.compute = CUBLAS_COMPUTE_32F_FAST_TF32;
           }),
      gemm("float32-in-float64", [](Gemm& g) { g.compute = CUBLAS_COMPUTE_64F; }),
      gemm("output-is-input", [](Gemm& g) { g.c = g.A.data(); }),
      gemm("output-overlaps-itself", [](Gemm& g) { g.stride_c = 15; }),
      gemm("one-output-for-all", [](Gemm& g) { g.stride_c = 0; }),
      gemm("use-after-free",
           [](Gemm& g) {
             const Device gone(at::kFloat, 4, 4, 4, 2);
             g.a = gone.data();
           }),
      gemm("unknown-handle", [](Gemm& g) { g.blas = nullptr; }),
      gemm("stale-stream", [](Gemm& g) { ok(cublasSetStream(g.h.blas, nullptr)); }),
      gemm("workspace-lost-with-stream",
           [](Gemm& g) {
             settings().own_workspace = true;
             ok(cublasSetWorkspace(g.h.blas, g.B.data(), 64));
             ok(cublasSetStream(g.h.blas, stream()));
           }),
      gemm("workspace-is-operand", [](Gemm& g) { ok(cublasSetWorkspace(g.h.blas, g.B.data(), 64)); }),
      gemm("workspace-released",
           [](Gemm& g) {
             const auto gone = allocate(1024);
             ok(cublasSetWorkspace(g.h.blas, gone.get(), 1024));
           }),
  };
}

int destroyed_handle() {
  cublasHandle_t handle = nullptr;
  ok(cublasCreate(&handle));
  ok(cublasDestroy(handle));
  return cublasSetStream(handle, stream());
}
int device_pointer_mode() {
  const Handles h;
  return cublasSetPointerMode(h.blas, CUBLAS_POINTER_MODE_DEVICE);
}

struct Batch {
  Handles h;
  Device A{at::kFloat, 3, 3, 3, 2}, B{at::kFloat, 3, 3, 3, 2};
  Pointers<float> a{A}, b{B};
  Info info{2};
  float one = 1;
  int trsm(float** left, float** right, int ldb = 3) const {
    return cublasStrsmBatched(h.blas, CUBLAS_SIDE_LEFT, kLower, CUBLAS_OP_N, CUBLAS_DIAG_NON_UNIT, 3, 3, &one, left, 3,
                              right, ldb, 2);
  }
  int potrf(float** matrices, int ld, int* flags) const {
    return cusolverDnSpotrfBatched(h.solver, kLower, 3, matrices, ld, flags, 2);
  }
};
Case batched(const std::string& name, const std::function<int(Batch&)>& run) {
  return {name, [=] {
            Batch call;
            return run(call);
          }};
}

std::vector<Case> batched_cases() {
  return {
      batched("trsm-host-pointers",
              [](Batch& x) {
                float* here[] = {x.A.data(0), x.A.data(1)};
                return x.trsm(here, x.b.data());
              }),
      batched("trsm-pointer-outside",
              [](Batch& x) {
                x.b.data()[1] += 1;
                return x.trsm(x.a.data(), x.b.data());
              }),
      batched("trsm-same-output-twice",
              [](Batch& x) {
                x.b.data()[1] = x.b.data()[0];
                return x.trsm(x.a.data(), x.b.data());
              }),
      batched("trsm-output-is-factor", [](Batch& x) { return x.trsm(x.a.data(), x.a.data()); }),
      batched("trsm-short-ld", [](Batch& x) { return x.trsm(x.a.data(), x.b.data(), 2); }),
      batched("potrf-host-info",
              [](Batch& x) {
                int here[2];
                return x.potrf(x.a.data(), 3, here);
              }),
      batched("potrf-misaligned-pointer",
              [](Batch& x) {
                x.a.data()[0] = reinterpret_cast<float*>(x.A.data<char>() + 2);
                return x.potrf(x.a.data(), 3, x.info.data());
              }),
      batched("potrf-short-ld", [](Batch& x) { return x.potrf(x.a.data(), 2, x.info.data()); }),
      batched("potrf-uninitialised-pointers",
              [](Batch& x) {
                const auto nan = allocate(2 * sizeof(float*));
                return x.potrf(static_cast<float**>(nan.get()), 3, x.info.data());
              }),
  };
}

// A right XsyevBatched of two 4 x 4 matrices; each case changes one thing after the workspace was asked for.
struct Eigen {
  Handles h;
  Device A{at::kFloat, 4, 4, 4, 2}, W{at::kFloat, 4, 1, 4, 2};
  Info info{2};
  cusolverDnHandle_t solver = h.solver;
  cusolverDnParams_t params = h.params;
  int64_t n = 4, ld = 4, batch = 2;
  cudaDataType type_w = CUDA_R_32F;
  void* w = W.data();
  size_t device = 0, host = 0, device_lacks = 0, host_lacks = 0, device_shift = 0;
  bool asks = true, zeroes = true;
  std::function<void()> between = [] {};
  int ask() {
    return cusolverDnXsyevBatched_bufferSize(solver, params, kVector, kLower, n, CUDA_R_32F, A.data(), ld, type_w, w,
                                             CUDA_R_32F, &device, &host, batch);
  }
  int run() {
    device = host = 100;
    if (asks) ok(ask());
    Room room(device + device_shift, host);
    if (!zeroes) ok(cudaMemsetAsync(room.device.get(), 1, device, stream()));
    between();
    return cusolverDnXsyevBatched(solver, params, kVector, kLower, n, CUDA_R_32F, A.data(), ld, type_w, w, CUDA_R_32F,
                                  static_cast<char*>(room.device.get()) + device_shift, device - device_lacks,
                                  room.host.data(), host - host_lacks, info.data(), batch);
  }
};
Case eigen(const std::string& name, const std::function<void(Eigen&)>& change) {
  return {"syev-" + name, [=] {
            Eigen call;
            change(call);
            return call.run();
          }};
}
Case eigen_query(const std::string& name, const std::function<void(Eigen&)>& change) {
  return {"syev-query-" + name, [=] {
            Eigen call;
            change(call);
            return call.ask();
          }};
}

std::vector<Case> eigen_cases() {
  return {
      eigen("not-asked", [](Eigen& e) { e.asks = false; }),
      eigen("asked-for-another-size", [](Eigen& e) { e.between = [&e] { e.n = 3; }; }),
      eigen("small-workspace", [](Eigen& e) { e.device_lacks = 1; }),
      eigen("small-host-workspace", [](Eigen& e) { e.host_lacks = 1; }),
      eigen("dear-batch",
            [](Eigen& e) {
              settings().cheap_batch = 1;
              ok(e.ask());
              e.asks = false;
              e.between = [&e] { expect(e.device == 100, "the default size"); };
            }),
      eigen("misaligned-workspace", [](Eigen& e) { e.device_shift = 4; }),
      eigen("not-zeroed",
            [](Eigen& e) {
              settings().cusolver_version = 11702;
              e.zeroes = false;
            }),
      eigen("default-algorithm",
            [](Eigen& e) {
              e.between = [&e] { ok(cusolverDnSetAdvOptions(e.params, CUSOLVERDN_SYEVBATCHED, CUSOLVER_ALG_0)); };
            }),
      eigen("values-overlap-matrix", [](Eigen& e) { e.w = e.A.data(); }),
      eigen("stale-stream", [](Eigen& e) { e.between = [&e] { ok(cusolverDnSetStream(e.solver, nullptr)); }; }),
      eigen_query("int32-overflow",
                  [](Eigen& e) {
                    e.n = e.ld = 4096;
                    e.batch = 128;
                  }),
      eigen_query("large-batch", [](Eigen& e) { e.batch = 65536; }),
      eigen_query("mixed-types", [](Eigen& e) { e.type_w = CUDA_R_64F; }),
      eigen_query("old-version", [](Eigen&) { settings().cusolver_version = 11602; }),
      eigen_query("short-ld", [](Eigen& e) { e.ld = 3; }),
      eigen_query("unknown-params", [](Eigen& e) { e.params = nullptr; }),
  };
}

int xgesvd_query(int64_t m, int64_t n, int64_t ldu) {
  const Handles h;
  size_t device = 0, host = 0;
  return cusolverDnXgesvd_bufferSize(h.solver, h.params, 'S', 'S', m, n, CUDA_R_32F, nullptr, m, CUDA_R_32F, nullptr,
                                     CUDA_R_32F, nullptr, ldu, CUDA_R_32F, nullptr, n, CUDA_R_32F, &device, &host);
}
// U with k columns, as a caller might think is enough.
int xgesvdr(int64_t k, int64_t p) {
  const Handles h;
  const int64_t m = 8, n = 7;
  Device A(at::kFloat, m, n), S(at::kFloat, n, 1), U(at::kFloat, m, k), V(at::kFloat, n, n);
  const Info info(1);
  size_t device = 0, host = 0;
  const auto t = CUDA_R_32F;
  if (const int status = cusolverDnXgesvdr_bufferSize(h.solver, h.params, 'S', 'S', m, n, k, p, 2, t, A.data(), m, t,
                                                      S.data(), t, U.data(), m, t, V.data(), n, t, &device, &host))
    return status;
  Room room(device, host);
  return cusolverDnXgesvdr(h.solver, h.params, 'S', 'S', m, n, k, p, 2, t, A.data(), m, t, S.data(), t, U.data(), m, t,
                           V.data(), n, t, room.device.get(), device, room.host.data(), host, info.data());
}
int gesvda_query(int m, int n, int rank, long long stride, int batch) {
  const Handles h;
  int lwork = 0;
  return cusolverDnSgesvdaStridedBatched_bufferSize(h.solver, kVector, rank, m, n, nullptr, m, stride, nullptr, n,
                                                    nullptr, m, stride, nullptr, n, n * n, &lwork, batch);
}
int gesvdj_query(int m, int n) {
  const Handles h;
  gesvdjInfo_t jacobi = nullptr;
  ok(cusolverDnCreateGesvdjInfo(&jacobi));
  int lwork = 0;
  const int status = cusolverDnSgesvdj_bufferSize(h.solver, kVector, 1, m, n, nullptr, m, nullptr, nullptr, m, nullptr,
                                                  n, &lwork, jacobi);
  ok(cusolverDnDestroyGesvdjInfo(jacobi));
  return status;
}

int copy(cudaMemcpyKind kind, size_t bytes, cudaStream_t on = stream()) {
  const auto device = allocate(64);
  float here[16] = {};
  return cudaMemcpyAsync(here, device.get(), bytes, kind, on);
}
int capture(const std::function<int()>& run) {
  settings().capturing = true;
  const int status = run();
  settings().capturing = false;
  return status;
}
// Give back the memory, or wait, after a kernel wrote where it should not: noticed, though no call returns an error.
int write_past_end() {
  const auto device = allocate(10);
  static_cast<char*>(device.get())[10] = 0;
  return cudaStreamSynchronize(stream());
}
int write_before_begin() {
  const auto device = allocate(10);
  static_cast<char*>(device.get())[-1] = 0;
  return 0;
}
int write_after_free() {
  char* dangling = static_cast<char*>(allocate(10).get());
  dangling[3] = 0;
  return 0;
}
int pinned_changed_too_early() {
  const auto device = allocate(4);
  void* pinned = nullptr;
  ok(cudaHostAlloc(&pinned, 4, cudaHostAllocDefault));
  ok(cudaMemcpyAsync(device.get(), pinned, 4, cudaMemcpyHostToDevice, stream()));
  static_cast<char*>(pinned)[0] = 1;
  const int status = cudaStreamSynchronize(stream());
  ok(cudaFreeHost(pinned));
  return status;
}

}  // namespace

std::vector<Case> wrong_cases() {
  std::vector<Case> all = gemm_cases();
  for (Case& each : batched_cases()) all.push_back(std::move(each));
  for (Case& each : eigen_cases()) all.push_back(std::move(each));
  const std::vector<Case> others = {
      {"destroyed-handle", destroyed_handle},
      {"device-pointer-mode", device_pointer_mode},
      {"gesvd-wide", [] { return xgesvd_query(4, 5, 4); }},
      {"gesvd-short-ldu", [] { return xgesvd_query(5, 4, 4); }},
      {"gesvdr-too-many", [] { return xgesvdr(4, 3); }},
      {"gesvdr-thin-u", [] { return xgesvdr(2, 2); }},
      {"gesvda-wide", [] { return gesvda_query(4, 5, 2, 20, 2); }},
      {"gesvda-int32-overflow", [] { return gesvda_query(4096, 4096, 8, 1 << 24, 128); }},
      {"gesvda-rank", [] { return gesvda_query(5, 4, 5, 20, 2); }},
      {"gesvdj-int32-overflow", [] { return gesvdj_query(65536, 65536); }},
      {"gesvdj-lwork-overflow", [] { return gesvdj_query(40000, 40000); }},
      {"copy-too-long", [] { return copy(cudaMemcpyDeviceToHost, 65); }},
      {"copy-wrong-kind", [] { return copy(cudaMemcpyDeviceToDevice, 64); }},
      {"copy-wrong-stream", [] { return copy(cudaMemcpyDeviceToHost, 64, nullptr); }},
      {"set-device", [] { return static_cast<int>(cudaSetDevice(1)); }},
      {"memset-outside", [] { return static_cast<int>(cudaMemsetAsync(stream(), 0, 1, stream())); }},
      {"capture-synchronize", [] { return capture([] { return static_cast<int>(cudaStreamSynchronize(stream())); }); }},
      {"capture-pageable-copy", [] { return capture([] { return copy(cudaMemcpyDeviceToHost, 64); }); }},
      {"capture-pinned-allocation",
       [] {
         void* pinned = nullptr;
         return capture([&] { return static_cast<int>(cudaMallocHost(&pinned, 4)); });
       }},
      {"capture-handle",
       [] {
         cublasHandle_t handle = nullptr;
         return capture([&] { return static_cast<int>(cublasCreate(&handle)); });
       }},
      {"launch-on-another-stream",
       [] {
         observe_launch(nullptr);
         return 0;
       }},
      {"write-past-end", write_past_end},
      {"write-before-begin", write_before_begin},
      {"write-after-free", write_after_free},
      {"pinned-changed-too-early", pinned_changed_too_early},
  };
  all.insert(all.end(), others.begin(), others.end());
  return all;
}

}  // namespace osora::standins
