// SPDX-License-Identifier: Apache-2.0
// cuBLAS: C = alpha op(A) op(B) + beta C for a batch, in the precision that the compute type and the math mode stand
// for.
#include <ATen/Functions.h>

#include <bit>
#include <cmath>

#include "arrays.h"
#include "call.h"
#include "cublas.h"
#include "memory.h"
#include "rounding/errors.h"

namespace osora::standins {
namespace {

enum class Operands { kAsTheyAre, kTF32, kBFloat16, kFloat16 };

// cuBLAS manual, cublasGemmEx: compute type against the types of A (= B) and C.
bool is_combination(cublasComputeType_t compute, cudaDataType ab, cudaDataType c) {
  switch (compute) {
    case CUBLAS_COMPUTE_32F:
    case CUBLAS_COMPUTE_32F_PEDANTIC:
      if (ab == CUDA_R_16BF || ab == CUDA_R_16F) return c == ab || c == CUDA_R_32F;
      return ab == CUDA_R_32F && c == CUDA_R_32F;
    case CUBLAS_COMPUTE_32F_FAST_TF32:
    case CUBLAS_COMPUTE_32F_FAST_16BF:
    case CUBLAS_COMPUTE_32F_FAST_16F:
      return ab == CUDA_R_32F && c == CUDA_R_32F;
    case CUBLAS_COMPUTE_64F:
    case CUBLAS_COMPUTE_64F_PEDANTIC:
      return ab == CUDA_R_64F && c == CUDA_R_64F;
    default:
      return false;
  }
}

Operands rounding(cublasComputeType_t compute, cudaDataType ab, cublasMath_t math) {
  switch (compute) {
    case CUBLAS_COMPUTE_32F_FAST_TF32:
      return Operands::kTF32;
    case CUBLAS_COMPUTE_32F_FAST_16BF:
      return Operands::kBFloat16;
    case CUBLAS_COMPUTE_32F_FAST_16F:
      return Operands::kFloat16;
    case CUBLAS_COMPUTE_32F:
      return ab == CUDA_R_32F && (math & 3) == CUBLAS_TF32_TENSOR_OP_MATH ? Operands::kTF32 : Operands::kAsTheyAre;
    default:
      return Operands::kAsTheyAre;
  }
}

// To 10 stored bits of mantissa, to nearest, ties to even.
void round_to_tf32(float* values, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    if (!std::isfinite(values[k])) continue;
    const auto bits = std::bit_cast<uint32_t>(values[k]);
    values[k] = std::bit_cast<float>((bits + 0xfffu + (bits >> 13 & 1u)) & ~0x1fffu);
  }
}

// An operand as the multiplier sees it. Products of two bfloat16 or float16 numbers are exact in float32.
at::Tensor operand(const Matrix& matrix, int64_t index, cublasOperation_t op, at::ScalarType exact, Operands to) {
  at::Tensor values = view(matrix, index);
  if (to == Operands::kBFloat16) values = values.to(at::kBFloat16);
  if (to == Operands::kFloat16) values = values.to(at::kHalf);
  values = values.to(exact);
  if (to == Operands::kTF32) {
    values = values.clone(at::MemoryFormat::Contiguous);
    round_to_tf32(values.mutable_data_ptr<float>(), values.numel());
  }
  return op == CUBLAS_OP_N ? values : values.t();
}

double scalar(const void* value, bool is_double) {
  return is_double ? *static_cast<const double*>(value) : *static_cast<const float*>(value);
}

struct Scalars {
  const void* alpha;
  const void* beta;
};

void gemm(cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, const Scalars& scalars, int64_t k,
          const Matrix& a, const Matrix& b, const Matrix& c, cublasComputeType_t compute) {
  for (const cublasOperation_t op : {op_a, op_b})
    need(op == CUBLAS_OP_N || op == CUBLAS_OP_T || op == CUBLAS_OP_C, "operation ", static_cast<int>(op));
  need(k >= 0, "k is ", k);
  need_or(CUBLAS_STATUS_NOT_SUPPORTED, a.type == b.type && is_combination(compute, a.type, c.type), "A ",
          name_of(a.type), ", B ", name_of(b.type), ", C ", name_of(c.type), " do not go with compute type ",
          static_cast<int>(compute));
  need(scalars.alpha && scalars.beta, "alpha or beta is null");
  need(!is_device(scalars.alpha) && !is_device(scalars.beta), "alpha or beta is device memory");
  for (const Matrix* each : {&a, &b, &c}) {
    need_device(*each);
    const bool slow = bytes_of(each->type) == 2 && reinterpret_cast<uintptr_t>(each->data) % 16 != 0;
    need(!slow || !settings().packs_of_16_bytes, each->name, " holds 16-bit numbers and is not aligned to 16 bytes");
  }
  need_disjoint({c}, {a, b});
  need_ready(handle, {a, b, c});
  const bool is_double = a.type == CUDA_R_64F;
  const at::ScalarType exact = is_double ? at::kDouble : at::kFloat;
  const double alpha = scalar(scalars.alpha, is_double), beta = scalar(scalars.beta, is_double);
  const Operands to = rounding(compute, a.type, handle->math);
  for (int64_t i = 0; i < c.batch; ++i) {
    at::Tensor out = view(c, i), sum;
    if (alpha == 0 || k == 0) {  // then A and B are not read, NaN or not
      sum = at::zeros(out.sizes(), out.options().dtype(exact));
    } else {
      const auto left = operand(a, i, op_a, exact, to), right = operand(b, i, op_b, exact, to);
      sum = at::mm(left, right);
      if (const int64_t seed = settings().rounding) osora::rounding::add_errors(uint64_t(seed), sum, left, right);
      sum.mul_(alpha);
    }
    if (beta != 0) sum.add_(out.to(exact), beta);
    out.copy_(sum);
  }
}

Matrix stored(const char* name, const void* data, cudaDataType type, cublasOperation_t op, int64_t rows,
              int64_t columns, int64_t ld, int64_t batch, int64_t stride) {
  if (op != CUBLAS_OP_N) std::swap(rows, columns);
  return {name, data, type, rows, columns, ld, batch, stride};
}

}  // namespace
}  // namespace osora::standins

using namespace osora::standins;

extern "C" {

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m,
                                          int n, int k, const void* alpha, const void* A, cudaDataType Atype, int lda,
                                          long long strideA, const void* B, cudaDataType Btype, int ldb,
                                          long long strideB, const void* beta, void* C, cudaDataType Ctype, int ldc,
                                          long long strideC, int batch, cublasComputeType_t compute, cublasGemmAlgo_t) {
  return answer("cublasGemmStridedBatchedEx", CUBLAS_STATUS_INVALID_VALUE, [&](const Call&) {
    if (compute == CUBLAS_COMPUTE_32F_PEDANTIC) const Call counted("pedantic product");
    gemm(handle, op_a, op_b, {alpha, beta}, k, stored("A", A, Atype, op_a, m, k, lda, batch, strideA),
         stored("B", B, Btype, op_b, k, n, ldb, batch, strideB), {"C", C, Ctype, m, n, ldc, batch, strideC}, compute);
  });
}

cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m, int n, int k,
                            const void* alpha, const void* A, cudaDataType Atype, int lda, const void* B,
                            cudaDataType Btype, int ldb, const void* beta, void* C, cudaDataType Ctype, int ldc,
                            cublasComputeType_t compute, cublasGemmAlgo_t) {
  return answer("cublasGemmEx", CUBLAS_STATUS_INVALID_VALUE, [&](const Call&) {
    gemm(handle, op_a, op_b, {alpha, beta}, k, stored("A", A, Atype, op_a, m, k, lda, 1, 0),
         stored("B", B, Btype, op_b, k, n, ldb, 1, 0), {"C", C, Ctype, m, n, ldc}, compute);
  });
}

}  // extern "C"
