// SPDX-License-Identifier: Apache-2.0
// The SVD drivers against torch in float64, and the runtime: copies, waiting, planted faults.
#include <cstring>

#include "self_test.h"
#include "tensors.h"

namespace osora::standins {
namespace {

constexpr auto kVector = CUSOLVER_EIG_MODE_VECTOR;

// A [1, m, n], with U [m, columns of U], V [n, columns of V] (or V^T) as a driver wants them.
struct Problem {
  Problem(at::ScalarType type, int64_t m, int64_t n, int64_t u_columns, int64_t v_columns)
      : type(type),
        t(type_of(type)),
        A(type, m, n, m + 2),
        S(type, std::min(m, n), 1),
        U(type, m, u_columns, m + 1),
        V(type, n, v_columns, n + 3),
        info(1) {
    A.fill(at::randn({1, m, n}, at::TensorOptions().dtype(at::kDouble)));
    original = A.exact()[0];
  }
  // The leading `keep` triplets; all of them where that is min(m, n).
  void expect_right(int64_t keep, bool transposed = false) const {
    const auto [exact_U, exact_S, exact_Vt] = at::linalg_svd(original, /*full_matrices=*/false);
    const double allowed = type == at::kDouble ? 1e-13 : 1e-5;
    const at::Tensor s = S.exact()[0].select(1, 0).narrow(0, 0, keep), u = U.exact()[0].narrow(1, 0, keep);
    const at::Tensor v = transposed ? V.exact()[0].t().narrow(1, 0, keep) : V.exact()[0].narrow(1, 0, keep);
    expect(info[0] == 0, "info is ", info[0]);
    expect_near(s, exact_S.narrow(0, 0, keep), allowed, "singular values");
    const at::Tensor exact =
        at::mm(exact_U.narrow(1, 0, keep).mul(exact_S.narrow(0, 0, keep)), exact_Vt.narrow(0, 0, keep));
    expect_near(at::mm(u.mul(s), v.t()), exact, allowed, "U S V^T");
    expect(A.all.isnan().all().item<bool>(), "A is not destroyed");
    A.expect_gaps_untouched();
    U.expect_gaps_untouched();
    V.expect_gaps_untouched();
  }
  at::ScalarType type;
  cudaDataType t;
  Device A, S, U, V;
  Info info;
  at::Tensor original;
};

void gesvd(at::ScalarType type) {
  const Handles h;
  Problem p(type, 9, 5, 5, 5);
  size_t device = 0, host = 0;
  ok(cusolverDnXgesvd_bufferSize(h.solver, h.params, 'S', 'S', 9, 5, p.t, nullptr, p.A.ld, p.t, nullptr, p.t, nullptr,
                                 p.U.ld, p.t, nullptr, p.V.ld, p.t, &device, &host));
  Room room(device, host);
  ok(cusolverDnXgesvd(h.solver, h.params, 'S', 'S', 9, 5, p.t, p.A.data(), p.A.ld, p.t, p.S.data(), p.t, p.U.data(),
                      p.U.ld, p.t, p.V.data(), p.V.ld, p.t, room.device.get(), device, room.host.data(), host,
                      p.info.data()));
  p.expect_right(5, /*transposed=*/true);
}

void gesvdp(at::ScalarType type, int64_t m, int64_t n, int econ) {
  const Handles h;
  const int64_t least = std::min(m, n);
  Problem p(type, m, n, econ ? least : m, econ ? least : n);
  size_t device = 0, host = 0;
  double err_sigma = -1;
  ok(cusolverDnXgesvdp_bufferSize(h.solver, h.params, kVector, econ, m, n, p.t, nullptr, p.A.ld, p.t, nullptr, p.t,
                                  nullptr, p.U.ld, p.t, nullptr, p.V.ld, p.t, &device, &host));
  Room room(device, host);
  ok(cusolverDnXgesvdp(h.solver, h.params, kVector, econ, m, n, p.t, p.A.data(), p.A.ld, p.t, p.S.data(), p.t,
                       p.U.data(), p.U.ld, p.t, p.V.data(), p.V.ld, p.t, room.device.get(), device, room.host.data(),
                       host, p.info.data(), &err_sigma));
  expect(err_sigma == 0, "h_err_sigma is ", err_sigma);
  p.expect_right(least);
}

void gesvdr(at::ScalarType type, int64_t m, int64_t n) {
  const Handles h;
  Problem p(type, m, n, m, n);
  size_t device = 0, host = 0;
  ok(cusolverDnXgesvdr_bufferSize(h.solver, h.params, 'S', 'S', m, n, 3, 2, 2, p.t, nullptr, p.A.ld, p.t, nullptr, p.t,
                                  nullptr, p.U.ld, p.t, nullptr, p.V.ld, p.t, &device, &host));
  Room room(device, host);
  ok(cusolverDnXgesvdr(h.solver, h.params, 'S', 'S', m, n, 3, 2, 2, p.t, p.A.data(), p.A.ld, p.t, p.S.data(), p.t,
                       p.U.data(), p.U.ld, p.t, p.V.data(), p.V.ld, p.t, room.device.get(), device, room.host.data(),
                       host, p.info.data()));
  p.expect_right(3);
  expect(p.U.all.narrow(2, 3, m - 3).isnan().all().item<bool>(), "U beyond k is not garbage");
}

void gesvdj(at::ScalarType type, int64_t m, int64_t n) {
  const Handles h;
  const int64_t least = std::min(m, n);
  Problem p(type, m, n, least, least);
  gesvdjInfo_t jacobi = nullptr;
  ok(cusolverDnCreateGesvdjInfo(&jacobi));
  ok(cusolverDnXgesvdjSetTolerance(jacobi, 1e-7));
  ok(cusolverDnXgesvdjSetMaxSweeps(jacobi, 400));
  int lwork = 0;
  const auto work = [&] { return allocate(static_cast<size_t>(lwork) * at::elementSize(type)); };
  if (type == at::kDouble) {
    using T = double;
    ok(cusolverDnDgesvdj_bufferSize(h.solver, kVector, 1, m, n, p.A.data<T>(), p.A.ld, p.S.data<T>(), p.U.data<T>(),
                                    p.U.ld, p.V.data<T>(), p.V.ld, &lwork, jacobi));
    ok(cusolverDnDgesvdj(h.solver, kVector, 1, m, n, p.A.data<T>(), p.A.ld, p.S.data<T>(), p.U.data<T>(), p.U.ld,
                         p.V.data<T>(), p.V.ld, static_cast<T*>(work().get()), lwork, p.info.data(), jacobi));
  } else {
    ok(cusolverDnSgesvdj_bufferSize(h.solver, kVector, 1, m, n, p.A.data(), p.A.ld, p.S.data(), p.U.data(), p.U.ld,
                                    p.V.data(), p.V.ld, &lwork, jacobi));
    ok(cusolverDnSgesvdj(h.solver, kVector, 1, m, n, p.A.data(), p.A.ld, p.S.data(), p.U.data(), p.U.ld, p.V.data(),
                         p.V.ld, static_cast<float*>(work().get()), lwork, p.info.data(), jacobi));
  }
  p.expect_right(least);
  ok(cusolverDnDestroyGesvdjInfo(jacobi));
}

template <class T, class Size, class Solve>
void gesvda(int rank, const Size& ask, const Solve& solve) {
  const Handles h;
  const int m = 8, n = 5, batch = 3;
  const at::ScalarType type = sizeof(T) == 8 ? at::kDouble : at::kFloat;
  Device A(type, m, n, m + 1, batch), S(type, rank, 1, rank, batch, 2), U(type, m, rank, m, batch),
      V(type, n, rank, n + 1, batch);
  A.fill(at::randn({batch, m, n}, at::TensorOptions().dtype(at::kDouble)));
  const at::Tensor original = A.exact();
  const Info info(batch);
  int lwork = 0;
  std::vector<double> residuals(batch, -1);
  ok(ask(h.solver, kVector, rank, m, n, A.data<T>(), A.ld, A.stride, S.data<T>(), S.stride, U.data<T>(), U.ld, U.stride,
         V.data<T>(), V.ld, V.stride, &lwork, batch));
  const auto work = allocate(static_cast<size_t>(lwork) * sizeof(T));
  ok(solve(h.solver, kVector, rank, m, n, A.data<T>(), A.ld, A.stride, S.data<T>(), S.stride, U.data<T>(), U.ld,
           U.stride, V.data<T>(), V.ld, V.stride, static_cast<T*>(work.get()), lwork, info.data(), residuals.data(),
           batch));
  const auto [exact_U, exact_S, exact_Vt] = at::linalg_svd(original, /*full_matrices=*/false);
  const double allowed = sizeof(T) == 8 ? 1e-13 : 1e-5;
  expect_near(S.all.squeeze(2), exact_S.narrow(1, 0, rank), allowed, "singular values");
  const at::Tensor exact =
      at::bmm(exact_U.narrow(2, 0, rank).mul(exact_S.narrow(1, 0, rank).unsqueeze(1)), exact_Vt.narrow(1, 0, rank));
  expect_near(at::bmm(U.exact().mul(S.exact().transpose(1, 2)), V.exact().transpose(1, 2)), exact, allowed, "U S V^T");
  expect(A.exact().equal(original), "A has changed");
  for (const double residual : residuals) expect(residual >= 0 && residual < 10 * allowed, "residual ", residual);
}

int svd_all() {
  for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
    gesvd(type);
    gesvdp(type, 9, 5, 1);
    gesvdp(type, 5, 9, 1);
    gesvdp(type, 6, 6, 0);
    gesvdr(type, 9, 7);
    gesvdr(type, 7, 9);
    gesvdj(type, 9, 5);
    gesvdj(type, 4, 7);
  }
  for (const int rank : {2, 5}) {
    gesvda<float>(rank, cusolverDnSgesvdaStridedBatched_bufferSize, cusolverDnSgesvdaStridedBatched);
    gesvda<double>(rank, cusolverDnDgesvdaStridedBatched_bufferSize, cusolverDnDgesvdaStridedBatched);
  }
  return 0;
}

// Pinned memory has its numbers only after the host has waited; pageable memory has them, and costs a wait.
int copies() {
  const auto device = allocate(64);
  std::vector<float> pageable(16, 3.0f);
  void* pinned = nullptr;
  ok(cudaMallocHost(&pinned, 64));
  auto* const numbers = static_cast<float*>(pinned);
  ok(cudaMemcpyAsync(device.get(), pageable.data(), 64, cudaMemcpyHostToDevice, stream()));
  ok(cudaMemcpyAsync(numbers, device.get(), 64, cudaMemcpyDeviceToHost, stream()));
  expect(counts().host_waits == 0, "a copy to pinned memory waited");
  expect(numbers[0] != 3, "pinned memory has its numbers too early");
  cudaEvent_t event = nullptr;
  ok(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  ok(cudaEventRecord(event, stream()));
  ok(cudaMemsetAsync(device.get(), 0, 64, stream()));  // behind the copy
  ok(cudaEventSynchronize(event));
  expect(numbers[0] == 3 && numbers[15] == 3, "the event came before the copy");
  ok(cudaMemcpy2DAsync(pageable.data(), 16, device.get(), 8, 8, 4, cudaMemcpyDeviceToHost, stream()));
  expect(pageable[0] == 0 && pageable[1] == 0 && pageable[2] == 3 && pageable[13] == 0, "the pitches were ignored");
  expect(counts().host_waits == 2, "waits: ", counts().host_waits);
  ok(cudaStreamSynchronize(stream()));
  ok(cudaEventDestroy(event));
  ok(cudaFreeHost(pinned));
  return 0;
}

int faults() {
  const auto device = allocate(64);
  inject({"cudaMemsetAsync", 2, cudaErrorIllegalAddress});
  ok(cudaMemsetAsync(device.get(), 0, 64, stream()));
  expect(cudaMemsetAsync(device.get(), 0, 64, stream()) == cudaErrorIllegalAddress, "no fault");
  expect(cudaPeekAtLastError() == cudaErrorIllegalAddress, "not the last error");
  expect(cudaGetLastError() == cudaErrorIllegalAddress && cudaGetLastError() == cudaSuccess, "the error stays");
  ok(cudaMemsetAsync(device.get(), 0, 64, stream()));
  const Handles h;
  Device A(at::kFloat, 2, 2, 2, 2);
  A.fill(at::eye(2));
  const Pointers<float> a(A);
  const Info info(2);
  inject({"cusolverDnSpotrfBatched", 1, 0, /*info=*/2, /*matrix=*/1});
  ok(cusolverDnSpotrfBatched(h.solver, CUBLAS_FILL_MODE_LOWER, 2, a.data(), 2, info.data(), 2));
  expect(info[0] == 0 && info[1] == 2 && faults_left() == 0, "info is ", info[0], " ", info[1]);
  expect(A.all[0].equal(at::eye(2)) && A.all[1].tril().isnan().any().item<bool>(), "which matrix failed?");
  inject({"allocate", 1, 1});
  try {
    allocate(1);
  } catch (const std::runtime_error&) {
    return 0;
  }
  throw Wrong("allocate() did not fail");
}

int versions_and_attributes() {
  int value = 0;
  settings().cusolver_version = 11602;
  settings().capability = 120;
  ok(cusolverGetProperty(MINOR_VERSION, &value));
  expect(value == 6, "minor version ", value);
  ok(cublasGetProperty(MAJOR_VERSION, &value));
  expect(value == 13, "major version ", value);
  ok(cudaDeviceGetAttribute(&value, cudaDevAttrComputeCapabilityMajor, 0));
  expect(value == 12, "capability ", value);
  cudaStreamCaptureStatus status{};
  settings().capturing = true;
  ok(cudaStreamIsCapturing(stream(), &status));
  expect(status == cudaStreamCaptureStatusActive, "not capturing");
  expect(counts().calls["cusolverGetProperty"] == 1, "calls are not counted");
  return 0;
}

int memory_and_tensors() {
  const at::Tensor weight = at::ones({4});
  const Lent lent(weight.data_ptr(), 16);
  const auto device = allocate(16);
  ok(cudaMemcpyAsync(device.get(), weight.data_ptr(), 16, cudaMemcpyDeviceToDevice, stream()));
  expect(static_cast<float*>(device.get())[3] == 1, "not copied");
  at::Tensor tensor = to_device(at::ones({2, 3}).t());
  expect(tensor.is_contiguous() && tensor.equal(at::ones({3, 2})) && is_device(tensor.data_ptr()), "not on the device");
  observe_launch(stream());
  expect(counts().calls["launch"] == 1 && counts().live_allocations == 2, "not counted");
  tensor.reset();
  expect(counts().live_allocations == 1, "the tensor's memory stays");
  return 0;
}

}  // namespace

std::vector<Case> right_svd_cases() { return {{"svd", svd_all}}; }
std::vector<Case> right_runtime_cases() {
  return {{"copies", copies},
          {"faults", faults},
          {"versions-and-attributes", versions_and_attributes},
          {"memory-and-tensors", memory_and_tensors}};
}

}  // namespace osora::standins
