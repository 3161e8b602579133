// SPDX-License-Identifier: Apache-2.0
// Everything about a truncated SVD that can be decided from integers, before a byte is allocated.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace osora::core {

// The numbers are part of the operator osora::truncated_svd: python/osora/svd/arguments.py names them.
enum class SvdMethod : int64_t {
  kLanczos = 0,  // core/lanczos.h
  kGram = 1,     // eigenvectors of A^T A
  kFull = 2,     // every singular triplet, LAPACK's gesdd or cuSOLVER's gesvdp
  kLowrank = 3,  // subspace iteration as in torch.svd_lowrank: for comparison
  kGesvd = 4,    // cuSOLVER's drivers, for comparison
  kGesvdj = 5,
  kGesvdp = 6,
  kGesvda = 7,
  kGesvdr = 8,
};

struct SvdPlan {
  SvdMethod method;
  bool transposed;  // the work is done on A = W^T [rows, cols], else on A = W
  int64_t rows, cols, rank;
  int64_t block;  // Lanczos: new columns per step
  int64_t keep;   // Lanczos: columns that survive a restart
  int64_t basis;  // Lanczos: columns at which a restart is due
  int64_t bytes;  // of the arrays that one matrix takes beyond the weight itself, at most; docs/svd.md, "Memory"
};

// Where the work is done. `threads` counts in the memory of the CPU's products alone.
struct SvdMachine {
  bool cuda = false;
  int64_t threads = 1;
};

// weight: [d, k]; itemsize: bytes of the working dtype (4 or 8), weight_itemsize: of the weight's. `method`: "auto" or
// one of svd_method_names(). Throws std::invalid_argument for anything else, or where the wished method cannot run.
SvdPlan plan_svd(int64_t d, int64_t k, int64_t rank, int64_t itemsize, int64_t weight_itemsize,
                 const std::string& method, const SvdMachine& machine);

// More than half of all triplets reach down to small singular values, which a float32 Gram matrix has lost.
bool gram_in_float64(const SvdPlan& plan);

// "lanczos", "gram", ... by the numbers of SvdMethod.
const std::vector<std::string>& svd_method_names();

}  // namespace osora::core
