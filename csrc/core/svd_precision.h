// SPDX-License-Identifier: Apache-2.0
// In which precision a GPU multiplies the weight by a block of vectors: decided once, from integers and tol.
#pragma once

namespace osora::core {

enum class WeightType { kFloat64, kFloat32, kBFloat16, kFloat16 };

enum class Products {
  kFloat64,
  kFloat32,   // float32, no tensor core
  kTf32,      // both factors rounded to 11 bits, summed in float32
  kBFloat16,  // the weight is bfloat16, the block is split into `terms` bfloat16 summands, sums in float32
};

struct Precision {
  Products products;
  int terms = 1;  // of the block; 3 hold all 24 bits of float32
};

// For the iteration. float64_work: the run is a float64 one, whatever the weight. capability: 90 for 9.0.
Precision iteration_precision(WeightType weight, bool float64_work, double tol, int capability);

// For the last Rayleigh-Ritz step: nothing is lost but float32 rounding.
Precision exact_precision(WeightType weight, bool float64_work, int capability);

}  // namespace osora::core
