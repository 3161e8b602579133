// SPDX-License-Identifier: Apache-2.0
#include "cuda/svd/dense_cuda.h"

namespace osora::cuda {
namespace {

cudaDataType data_type(Type type) {
  if (type == Type::kFloat64) return CUDA_R_64F;
  return type == Type::kFloat32 ? CUDA_R_32F : CUDA_R_16BF;
}

// bfloat16 is summed in float32.
cublasComputeType_t compute_type(Type type, Gemm how) {
  if (type == Type::kFloat64) return CUBLAS_COMPUTE_64F;
  if (how == Gemm::kTf32) return CUBLAS_COMPUTE_32F_FAST_TF32;
  return how == Gemm::kPedantic && type == Type::kFloat32 ? CUBLAS_COMPUTE_32F_PEDANTIC : CUBLAS_COMPUTE_32F;
}

cublasOperation_t operation(const Operand& a) { return a.transposed ? CUBLAS_OP_T : CUBLAS_OP_N; }

}  // namespace

Matrices slice(const Matrices& matrices, int64_t first, int64_t count) {
  Matrices part = matrices;
  part.data = matrices.at(first);
  part.batch = count;
  return part;
}

void gemm(const Context& context, const Operand& a, const Operand& b, const Matrices& c, int64_t inner, double alpha,
          double beta, Gemm how) {
  const float narrow_alpha = static_cast<float>(alpha), narrow_beta = static_cast<float>(beta);
  const bool is_wide = c.type == Type::kFloat64;
  const auto small = [](int64_t x) { return static_cast<int>(x); };
  check(cublasGemmStridedBatchedEx(context.blas, operation(a), operation(b), small(c.rows), small(c.cols), small(inner),
                                   is_wide ? static_cast<const void*>(&alpha) : &narrow_alpha, a.matrices.data,
                                   data_type(a.matrices.type), small(a.matrices.rows), a.matrices.stride,
                                   b.matrices.data, data_type(b.matrices.type), small(b.matrices.rows),
                                   b.matrices.stride, is_wide ? static_cast<const void*>(&beta) : &narrow_beta, c.data,
                                   data_type(c.type), small(c.rows), c.stride, small(c.batch),
                                   compute_type(a.matrices.type, how), CUBLAS_GEMM_DEFAULT),
        "cublasGemmStridedBatchedEx");
}

}  // namespace osora::cuda
