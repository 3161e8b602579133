// SPDX-License-Identifier: Apache-2.0
// Every stand-in against torch in float64: random numbers, columns and matrices with gaps between them, transposes.
#include <cmath>

#include "self_test.h"

namespace osora::standins {
namespace {

at::Tensor random(at::IntArrayRef shape) { return at::randn(shape, at::TensorOptions().dtype(at::kDouble)); }
double unit(at::ScalarType type) {
  return type == at::kDouble ? 0x1p-52 : type == at::kFloat ? 0x1p-23 : type == at::kHalf ? 0x1p-10 : 0x1p-7;
}
at::Tensor turned(const at::Tensor& matrices, cublasOperation_t op) {
  return op == CUBLAS_OP_N ? matrices : matrices.transpose(1, 2);
}

struct Product {
  at::ScalarType in, out;
  cublasComputeType_t compute;
  double error;  // relative to the largest number of the result
  cublasMath_t math = CUBLAS_DEFAULT_MATH;
};

void gemm(const Product& p, cublasOperation_t op_a, cublasOperation_t op_b, int64_t batch, double alpha, double beta) {
  const Handles handles;
  const int64_t m = 13, n = 9, k = 21;
  const auto shaped = [&](cublasOperation_t op, int64_t rows, int64_t columns) {
    return Device(p.in, op == CUBLAS_OP_N ? rows : columns, op == CUBLAS_OP_N ? columns : rows, 24, batch, 5);
  };
  Device A = shaped(op_a, m, k), B = shaped(op_b, k, n), C(p.out, m, n, 17, batch, 3);
  A.fill(random(A.all.sizes()));
  B.fill(random(B.all.sizes()));
  if (beta != 0) C.fill(random(C.all.sizes()));
  const at::Tensor product = at::bmm(turned(A.exact(), op_a), turned(B.exact(), op_b)).mul(alpha);
  const at::Tensor exact = beta != 0 ? product.add(C.exact(), beta) : product;
  const float alpha32 = static_cast<float>(alpha), beta32 = static_cast<float>(beta);
  const bool wide = p.in == at::kDouble;
  const void *alpha_at = wide ? static_cast<const void*>(&alpha) : &alpha32,
             *beta_at = wide ? static_cast<const void*>(&beta) : &beta32;
  ok(cublasSetMathMode(handles.blas, p.math));
  if (batch == 1) {
    ok(cublasGemmEx(handles.blas, op_a, op_b, m, n, k, alpha_at, A.data(), type_of(p.in), A.ld, B.data(), type_of(p.in),
                    B.ld, beta_at, C.data(), type_of(p.out), C.ld, p.compute, CUBLAS_GEMM_DEFAULT));
  } else {
    ok(cublasGemmStridedBatchedEx(handles.blas, op_a, op_b, m, n, k, alpha_at, A.data(), type_of(p.in), A.ld, A.stride,
                                  B.data(), type_of(p.in), B.ld, B.stride, beta_at, C.data(), type_of(p.out), C.ld,
                                  C.stride, batch, p.compute, CUBLAS_GEMM_DEFAULT));
  }
  expect_near(C.all, exact, p.error, text("compute type ", p.compute));
  C.expect_gaps_untouched();
}

int gemm_all() {
  const std::vector<Product> products = {
      {at::kDouble, at::kDouble, CUBLAS_COMPUTE_64F, 1e-14},
      {at::kFloat, at::kFloat, CUBLAS_COMPUTE_32F, 1e-6},
      {at::kFloat, at::kFloat, CUBLAS_COMPUTE_32F_PEDANTIC, 1e-6, CUBLAS_TF32_TENSOR_OP_MATH},
      {at::kFloat, at::kFloat, CUBLAS_COMPUTE_32F, 1e-3, CUBLAS_TF32_TENSOR_OP_MATH},
      {at::kFloat, at::kFloat, CUBLAS_COMPUTE_32F_FAST_TF32, 1e-3},
      {at::kFloat, at::kFloat, CUBLAS_COMPUTE_32F_FAST_16F, 1e-3},
      {at::kFloat, at::kFloat, CUBLAS_COMPUTE_32F_FAST_16BF, 1e-2},
      {at::kBFloat16, at::kFloat, CUBLAS_COMPUTE_32F, 1e-6},
      {at::kHalf, at::kFloat, CUBLAS_COMPUTE_32F, 1e-6},
      {at::kBFloat16, at::kBFloat16, CUBLAS_COMPUTE_32F, unit(at::kBFloat16)},
      {at::kHalf, at::kHalf, CUBLAS_COMPUTE_32F, unit(at::kHalf)},
  };
  for (const Product& product : products)
    for (const cublasOperation_t op_a : {CUBLAS_OP_N, CUBLAS_OP_T})
      for (const cublasOperation_t op_b : {CUBLAS_OP_N, CUBLAS_OP_C})
        for (const int64_t batch : {1, 3}) gemm(product, op_a, op_b, batch, 0.75, batch == 1 ? -0.5 : 0.0);
  return 0;
}

// 1 + 2^-11 lies halfway: to the even 1; 1 + 3 * 2^-11 to the even 1 + 2^-9; what is nearer goes there.
int tf32_rounding() {
  const Handles handles;
  const float one = 1, zero = 0;
  Device B(at::kFloat, 1, 1), C(at::kFloat, 1, 1), A(at::kFloat, 1, 1);
  B.fill(at::ones({}));
  const std::vector<std::pair<double, double>> pairs = {{1 + 0x1p-11, 1},
                                                        {1 + 0x3p-11, 1 + 0x1p-9},
                                                        {1 + 0x1p-11 + 0x1p-23, 1 + 0x1p-10},
                                                        {-1 - 0x1p-12, -1},
                                                        {INFINITY, INFINITY}};
  for (const auto& [given, rounded] : pairs) {
    A.fill(at::full({}, given, at::TensorOptions().dtype(at::kDouble)));
    ok(cublasGemmEx(handles.blas, CUBLAS_OP_N, CUBLAS_OP_N, 1, 1, 1, &one, A.data(), CUDA_R_32F, 1, B.data(),
                    CUDA_R_32F, 1, &zero, C.data(), CUDA_R_32F, 1, CUBLAS_COMPUTE_32F_FAST_TF32, CUBLAS_GEMM_DEFAULT));
    expect(C.data()[0] == rounded, given, " became ", C.data()[0]);
  }
  return 0;
}

// alpha = 0: A and B are not read. beta = 0: nor is C. One A for the whole batch: stride 0. Interleaved column blocks.
int gemm_edges() {
  const Handles handles;
  const float zero = 0, one = 1;
  Device A(at::kFloat, 3, 3), C(at::kFloat, 3, 3), V(at::kFloat, 4, 6, 4, 2);
  const auto product = [&](const float* alpha, int k, const float* a, const float* b, float* c) {
    return cublasGemmStridedBatchedEx(handles.blas, CUBLAS_OP_N, CUBLAS_OP_N, 4, 3, k, alpha, a, CUDA_R_32F, 4, 0, b,
                                      CUDA_R_32F, 4, V.stride, &zero, c, CUDA_R_32F, 4, V.stride, 2,
                                      CUBLAS_COMPUTE_32F_PEDANTIC, CUBLAS_GEMM_DEFAULT);
  };
  ok(cublasGemmEx(handles.blas, CUBLAS_OP_N, CUBLAS_OP_N, 3, 3, 3, &zero, A.data(), CUDA_R_32F, 3, A.data(), CUDA_R_32F,
                  3, &zero, C.data(), CUDA_R_32F, 3, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  expect(C.all.eq(0).all().item<bool>(), "0 * NaN + 0 * NaN is not 0");
  Device shared(at::kFloat, 4, 4);
  shared.fill(random({1, 4, 4}));
  V.fill(random({2, 4, 6}));
  const at::Tensor left = V.exact().narrow(2, 0, 3);
  ok(product(&one, 4, shared.data(), V.data(), V.data() + 3 * V.ld));
  expect_near(V.all.narrow(2, 3, 3), at::matmul(shared.exact(), left), 1e-6, "second half of the columns");
  expect(V.all.narrow(2, 0, 3).to(at::kDouble).equal(left), "the first half of the columns has changed");
  return 0;
}

template <class T>
void trsm_one(cublasSideMode_t side, cublasFillMode_t uplo, cublasOperation_t op, cublasDiagType_t diagonal) {
  const Handles handles;
  const at::ScalarType type = sizeof(T) == 8 ? at::kDouble : at::kFloat;
  const int64_t m = 6, n = 4, k = side == CUBLAS_SIDE_LEFT ? m : n, batch = 3;
  Device A(type, k, k, k + 2, batch), B(type, m, n, m + 1, batch, 7);
  const at::Tensor triangle = uplo == CUBLAS_FILL_MODE_LOWER ? at::ones({k, k}).tril() : at::ones({k, k}).triu();
  const at::Tensor full = random({batch, k, k}).mul(0.2).add(at::eye(k).mul(2));
  A.fill(at::where(triangle.ne(0), full, at::full({}, NAN, full.options())));
  B.fill(random({batch, m, n}));
  at::Tensor factor = A.exact().nan_to_num(0);
  if (diagonal == CUBLAS_DIAG_UNIT)
    factor = factor.sub(at::diag_embed(factor.diagonal(0, 1, 2))).add(at::eye(k, factor.options()));
  factor = turned(factor, op);
  const at::Tensor right_side = B.exact().mul(0.5);
  const at::Tensor exact = at::linalg_solve(factor, right_side, /*left=*/side == CUBLAS_SIDE_LEFT);
  const Pointers<T> a(A), b(B);
  const T alpha = T(0.5);
  if constexpr (sizeof(T) == 8) {
    ok(cublasDtrsmBatched(handles.blas, side, uplo, op, diagonal, m, n, &alpha, a.data(), A.ld, b.data(), B.ld, batch));
  } else {
    ok(cublasStrsmBatched(handles.blas, side, uplo, op, diagonal, m, n, &alpha, a.data(), A.ld, b.data(), B.ld, batch));
  }
  expect_near(B.all, exact, 100 * unit(type), "trsm");
  B.expect_gaps_untouched();
}
int trsm_all() {
  for (const cublasSideMode_t side : {CUBLAS_SIDE_LEFT, CUBLAS_SIDE_RIGHT})
    for (const cublasFillMode_t uplo : {CUBLAS_FILL_MODE_LOWER, CUBLAS_FILL_MODE_UPPER})
      for (const cublasOperation_t op : {CUBLAS_OP_N, CUBLAS_OP_T})
        for (const cublasDiagType_t diagonal : {CUBLAS_DIAG_NON_UNIT, CUBLAS_DIAG_UNIT}) {
          trsm_one<float>(side, uplo, op, diagonal);
          trsm_one<double>(side, uplo, op, diagonal);
        }
  return 0;
}

template <class T>
void potrf_one(cublasFillMode_t uplo) {
  const Handles handles;
  const at::ScalarType type = sizeof(T) == 8 ? at::kDouble : at::kFloat;
  const int64_t n = 7, batch = 3;
  Device A(type, n, n, n + 1, batch, 2);
  const at::Tensor root = random({batch, n, n});
  at::Tensor spd = at::bmm(root, root.transpose(1, 2)).add(at::eye(n));
  spd[1].select(0, 4).select(0, 4).fill_(-1);  // the second matrix fails at its fifth row
  const bool upper = uplo == CUBLAS_FILL_MODE_UPPER;
  const at::Tensor used = upper ? at::ones({n, n}).triu() : at::ones({n, n}).tril();
  A.fill(at::where(used.ne(0), spd, at::full({}, 77.0, spd.options())));  // the other triangle holds 77
  const at::Tensor lower = std::get<0>(at::linalg_cholesky_ex(spd));
  const Pointers<T> a(A);
  const Info info(batch);
  if constexpr (sizeof(T) == 8) {
    ok(cusolverDnDpotrfBatched(handles.solver, uplo, n, a.data(), A.ld, info.data(), batch));
  } else {
    ok(cusolverDnSpotrfBatched(handles.solver, uplo, n, a.data(), A.ld, info.data(), batch));
  }
  expect(info[0] == 0 && info[1] == 5 && info[2] == 0, "info is ", info[0], " ", info[1], " ", info[2]);
  for (const int64_t k : {0, 2}) {
    const at::Tensor factor = upper ? A.all[k].triu() : A.all[k].tril();
    expect_near(factor, upper ? lower[k].t() : lower[k], 100 * unit(type), "potrf");
  }
  expect(A.all.index({used.eq(0).expand({batch, n, n})}).eq(77).all().item<bool>(), "the other triangle has changed");
  A.expect_gaps_untouched();
}
int potrf_all() {
  for (const cublasFillMode_t uplo : {CUBLAS_FILL_MODE_LOWER, CUBLAS_FILL_MODE_UPPER}) {
    potrf_one<float>(uplo);
    potrf_one<double>(uplo);
  }
  return 0;
}

void syev(at::ScalarType type, cublasFillMode_t uplo, int64_t batch) {
  const Handles h;
  const int64_t n = 8;
  Device A(type, n, n, n + 3, batch), W(type, n, 1, n, batch);
  const at::Tensor root = random({batch, n, n}), full = root.add(root.transpose(1, 2));
  A.fill(uplo == CUBLAS_FILL_MODE_LOWER ? full.tril() : full.triu());
  const Info info(batch);
  size_t device = 0, host = 0;
  const cudaDataType t = type_of(type);
  const auto vector = CUSOLVER_EIG_MODE_VECTOR;
  if (batch == 1) {
    ok(cusolverDnXsyevd_bufferSize(h.solver, h.params, vector, uplo, n, t, nullptr, A.ld, t, nullptr, t, &device,
                                   &host));
    Room room(device, host);
    ok(cusolverDnXsyevd(h.solver, h.params, vector, uplo, n, t, A.data(), A.ld, t, W.data(), t, room.device.get(),
                        device, room.host.data(), host, info.data()));
  } else {
    ok(cusolverDnXsyevBatched_bufferSize(h.solver, h.params, vector, uplo, n, t, nullptr, A.ld, t, nullptr, t, &device,
                                         &host, batch));
    Room room(device, host);
    ok(cusolverDnXsyevBatched(h.solver, h.params, vector, uplo, n, t, A.data(), A.ld, t, W.data(), t, room.device.get(),
                              device, room.host.data(), host, info.data(), batch));
  }
  const at::Tensor vectors = A.exact(), values = W.exact().squeeze(2);
  expect_near(values, at::linalg_eigvalsh(full), 50 * unit(type), "eigenvalues");
  expect_near(at::bmm(vectors.mul(values.unsqueeze(1)), vectors.transpose(1, 2)), full, 50 * unit(type), "V L V^T");
  for (int64_t k = 0; k < batch; ++k) expect(info[k] == 0, "info[", k, "] is ", info[k]);
  A.expect_gaps_untouched();
}
int syev_all() {
  for (const at::ScalarType type : {at::kFloat, at::kDouble})
    for (const cublasFillMode_t uplo : {CUBLAS_FILL_MODE_LOWER, CUBLAS_FILL_MODE_UPPER})
      for (const int64_t batch : {1, 4}) syev(type, uplo, batch);
  return 0;
}

}  // namespace

std::vector<Case> right_svd_cases();
std::vector<Case> right_runtime_cases();

std::vector<Case> right_cases() {
  std::vector<Case> all = {{"gemm", gemm_all},         {"gemm-tf32-rounding", tf32_rounding},
                           {"gemm-edges", gemm_edges}, {"trsm", trsm_all},
                           {"potrf", potrf_all},       {"syev", syev_all}};
  for (Case& each : right_svd_cases()) all.push_back(std::move(each));
  for (Case& each : right_runtime_cases()) all.push_back(std::move(each));
  return all;
}

}  // namespace osora::standins
