// SPDX-License-Identifier: Apache-2.0
// cuBLAS: handles and products with triangular inverses. The other products are in cublas_gemm.cpp.
#include "cublas.h"

#include <ATen/Functions.h>

#include <cstring>

#include "arrays.h"
#include "call.h"
#include "memory.h"

namespace osora::standins {
namespace {

constexpr const char* kHandle = "cuBLAS handle";
constexpr size_t kWorkspaceAlignment = 256;
constexpr size_t kSpoiled = 64 << 10;  // of a workspace that has many megabytes

template <class Body>
cublasStatus_t run(const char* name, Body&& body) {
  return answer(name, CUBLAS_STATUS_INVALID_VALUE, std::forward<Body>(body));
}

void need_live(cublasHandle_t handle) {
  need_or(CUBLAS_STATUS_NOT_INITIALIZED, is_object(handle, kHandle), handle, " is no live ", kHandle);
}

template <class T>
cublasStatus_t trsm(const char* name, cublasHandle_t handle, cublasSideMode_t side, cublasFillMode_t uplo,
                    cublasOperation_t transposed, cublasDiagType_t diagonal, int m, int n, const T* alpha,
                    const T* const* a, int lda, T* const* b, int ldb, int batch) {
  return run(name, [&](const Call&) {
    need_live(handle);
    need(side == CUBLAS_SIDE_LEFT || side == CUBLAS_SIDE_RIGHT, "side is ", static_cast<int>(side));
    need(uplo == CUBLAS_FILL_MODE_LOWER || uplo == CUBLAS_FILL_MODE_UPPER, "uplo is ", static_cast<int>(uplo));
    need(transposed == CUBLAS_OP_N || transposed == CUBLAS_OP_T || transposed == CUBLAS_OP_C, "no such operation");
    need(alpha, "alpha is null");
    need(!is_device(alpha), "alpha is device memory");
    const bool left = side == CUBLAS_SIDE_LEFT, upper = uplo == CUBLAS_FILL_MODE_UPPER;
    const cudaDataType type = sizeof(T) == 8 ? CUDA_R_64F : CUDA_R_32F;
    const int k = left ? m : n;
    const auto* factors = reinterpret_cast<const void* const*>(a);
    const auto* sides = reinterpret_cast<const void* const*>(b);
    const auto A = matrices_at("A", factors, batch, {"A", nullptr, type, k, k, lda});
    const auto B = matrices_at("B", sides, batch, {"B", nullptr, type, m, n, ldb});
    const int64_t count = batch;
    std::vector<Matrix> read = A;
    read.push_back({"the array A", a, CUDA_R_8U, count * 8, 1, std::max<int64_t>(1, count * 8)});
    read.push_back({"the array B", b, CUDA_R_8U, count * 8, 1, std::max<int64_t>(1, count * 8)});
    need_disjoint(B, read);
    read.insert(read.end(), B.begin(), B.end());
    need_ready(handle, read);
    for (int64_t i = 0; i < count; ++i) {
      // The other triangle is not looked at; it may hold anything.
      at::Tensor factor = upper ? view(A[i]).triu() : view(A[i]).tril();
      if (transposed != CUBLAS_OP_N) factor = factor.t();
      at::Tensor out = view(B[i]);
      if (*alpha == 0 || out.numel() == 0) {
        out.zero_();
        continue;
      }
      const bool unit = diagonal == CUBLAS_DIAG_UNIT;
      out.copy_(at::linalg_solve_triangular(factor, out.mul(*alpha), upper == (transposed == CUBLAS_OP_N), left, unit));
    }
  });
}

}  // namespace

void need_ready(cublasHandle_t handle, const std::vector<Matrix>& operands) {
  need_live(handle);
  need(handle->stream == stream(), "the handle's stream is not the current one");
  need(handle->workspace || !settings().own_workspace, "no workspace was set after the last cublasSetStream");
  if (!handle->workspace) return;
  if (const auto why = outside(handle->workspace, handle->workspace_bytes))
    throw Refused{text("the handle's workspace ", *why)};
  const auto bytes = static_cast<int64_t>(handle->workspace_bytes);
  need_disjoint({{"the handle's workspace", handle->workspace, CUDA_R_8U, bytes, 1, std::max<int64_t>(1, bytes)}},
                operands);
  std::memset(handle->workspace, 0xff, std::min(handle->workspace_bytes, kSpoiled));
}

}  // namespace osora::standins

using namespace osora::standins;

extern "C" {

cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) {
  return run("cublasCreate", [&](const Call&) {
    need(handle, "the place for the handle is null");
    need(!settings().capturing, "a handle was made while a graph is being captured");
    *handle = new cublasContext;
    add_object(*handle, kHandle);
  });
}

cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) {
  return run("cublasDestroy", [&](const Call&) {
    need_live(handle);
    remove_object(handle, kHandle);
    delete handle;
  });
}

cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t given) {
  return run("cublasSetStream", [&](const Call&) {
    need_live(handle);
    handle->stream = given;
    handle->workspace = nullptr;  // "unconditionally resets the cuBLAS library workspace back to the default"
    handle->workspace_bytes = 0;
  });
}

cublasStatus_t cublasGetStream_v2(cublasHandle_t handle, cudaStream_t* current) {
  return run("cublasGetStream", [&](const Call&) {
    need_live(handle);
    need(current, "the place for the stream is null");
    *current = handle->stream;
  });
}

cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
  return run("cublasSetMathMode", [&](const Call&) {
    need_live(handle);
    const int known = mode & ~CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    need(known == CUBLAS_DEFAULT_MATH || known == CUBLAS_PEDANTIC_MATH || known == CUBLAS_TF32_TENSOR_OP_MATH,
         "math mode ", static_cast<int>(mode), " is not modelled");
    handle->math = mode;
  });
}

cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void* workspace, size_t bytes) {
  return run("cublasSetWorkspace", [&](const Call&) {
    need_live(handle);
    need(reinterpret_cast<uintptr_t>(workspace) % kWorkspaceAlignment == 0,
         "the workspace is not aligned to 256 bytes");
    if (const auto why = outside(workspace, bytes)) throw Refused{text("the workspace ", *why)};
    handle->workspace = workspace;
    handle->workspace_bytes = bytes;
  });
}

cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t mode) {
  return run("cublasSetPointerMode", [&](const Call&) {
    need_live(handle);
    need(mode == CUBLAS_POINTER_MODE_HOST, "alpha and beta in device memory are not modelled");
  });
}

cublasStatus_t cublasGetProperty(libraryPropertyType type, int* value) {
  return run("cublasGetProperty", [&](const Call&) {
    need(value, "the place for the value is null");
    const int version = settings().cublas_version;
    need(type == MAJOR_VERSION || type == MINOR_VERSION || type == PATCH_LEVEL, "no such property");
    *value = type == MAJOR_VERSION ? version / 10000 : type == MINOR_VERSION ? version / 100 % 100 : version % 100;
  });
}

const char* cublasGetStatusString(cublasStatus_t status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS:
      return "success";
    case CUBLAS_STATUS_NOT_INITIALIZED:
      return "the library was not initialized";
    case CUBLAS_STATUS_INVALID_VALUE:
      return "an unsupported value or parameter was passed to the function";
    case CUBLAS_STATUS_NOT_SUPPORTED:
      return "the functionality requested is not supported";
    default:
      return "another cuBLAS error";
  }
}

cublasStatus_t cublasStrsmBatched(cublasHandle_t handle, cublasSideMode_t side, cublasFillMode_t uplo,
                                  cublasOperation_t trans, cublasDiagType_t diag, int m, int n, const float* alpha,
                                  const float* const A[], int lda, float* const B[], int ldb, int batch) {
  return trsm("cublasStrsmBatched", handle, side, uplo, trans, diag, m, n, alpha, A, lda, B, ldb, batch);
}
cublasStatus_t cublasDtrsmBatched(cublasHandle_t handle, cublasSideMode_t side, cublasFillMode_t uplo,
                                  cublasOperation_t trans, cublasDiagType_t diag, int m, int n, const double* alpha,
                                  const double* const A[], int lda, double* const B[], int ldb, int batch) {
  return trsm("cublasDtrsmBatched", handle, side, uplo, trans, diag, m, n, alpha, A, lda, B, ldb, batch);
}

}  // extern "C"
