// SPDX-License-Identifier: Apache-2.0
#include "core/svd_precision.h"

namespace osora::core {
namespace {

constexpr int kTensorCores = 80;  // first with bfloat16 and TF32

// Smallest relative residual that the iteration reached on a weight whose entries are bfloat16 numbers (a 2048 x 2048
// layer at rank 64, products rounded as named and summed in float32). Above the floor convergence is that of float32.
//   bfloat16, 1 term   9e-4       TF32                1e-4
//   bfloat16, 2 terms  8e-6       bfloat16, 3 terms   7e-6, as float32
// Each bound lies a factor of three or more above its floor. Two terms reach as far as three there, but carry 16 bits,
// not 24: below 1e-4 nothing is saved on them.
constexpr double kOneTerm = 3e-3, kTwoTerms = 1e-4, kTf32 = 3e-4;

}  // namespace

Precision exact_precision(WeightType weight, bool float64_work, int capability) {
  if (float64_work || weight == WeightType::kFloat64) return {Products::kFloat64};
  if (weight == WeightType::kBFloat16 && capability >= kTensorCores) return {Products::kBFloat16, 3};
  return {Products::kFloat32};
}

Precision iteration_precision(WeightType weight, bool float64_work, double tol, int capability) {
  const Precision exact = exact_precision(weight, float64_work, capability);
  if (exact.products == Products::kBFloat16)
    return {Products::kBFloat16, tol >= kOneTerm ? 1 : tol >= kTwoTerms ? 2 : 3};
  // float16 numbers have the 11 bits of TF32, so that only the block is rounded; float32 weights would lose digits.
  const bool fits = weight == WeightType::kFloat16 && exact.products == Products::kFloat32;
  if (fits && tol >= kTf32 && capability >= kTensorCores) return {Products::kTf32};
  return exact;
}

}  // namespace osora::core
