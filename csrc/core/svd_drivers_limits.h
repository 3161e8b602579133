// SPDX-License-Identifier: Apache-2.0
// What cuSOLVER's SVD drivers can take, decided from integers before any work. No CUDA here: a wish is refused with the
// same words on every machine.
#pragma once
#include <cstdint>
#include <stdexcept>

#include "core/svd_plan.h"

namespace osora::core {

// Columns that gesvdr iterates with beyond `rank`, where the smaller side of the matrix is `cols`. NVIDIA's manual
// wants at least 2 rank, and less than cols - rank.
int64_t gesvdr_oversampling(int64_t cols, int64_t rank);

// method: kGesvd .. kGesvdr. Throws std::invalid_argument where the driver cannot give `rank` triplets (1 .. min(d, k))
// of a matrix [d, k]. `itemsize`, bytes of the working dtype, is part of the question; no limit known so far depends on
// it.
void refuse_driver(SvdMethod method, int64_t d, int64_t k, int64_t rank, int64_t itemsize);

// The older drivers give the size of their workspace in an int, which overflows. Throws std::invalid_argument then.
void refuse_workspace(SvdMethod method, int64_t numbers);

// A driver ran and has no answer: it did not converge, or gave NaN.
struct DriverFailed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace osora::core
