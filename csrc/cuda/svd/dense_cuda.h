// SPDX-License-Identifier: Apache-2.0
// The Dense algebra (core/dense.h) on cuBLAS and cuSOLVER. No torch: addresses, sizes and a Context.
//
// Everything is queued on the context's stream. The host waits in relative_size() and report() alone, once each; and in
// cuSOLVER's Xsyevd, where gram_vectors() gives it one large matrix or the library is too old for XsyevBatched. What a
// solver reports as failed marks its matrix for good: it is never certified.
#pragma once
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "core/dense.h"
#include "core/svd_plan.h"
#include "core/svd_precision.h"
#include "cuda/svd/context.h"
#include "cuda/svd/svd_kernels.h"

namespace osora::cuda {

// Matrices that keep their memory alive. A vector [n] per matrix is a matrix [1, n].
struct CudaArray : Matrices {
  std::shared_ptr<void> owner;
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// Of float32 products. kAsIs: no TF32 unless the environment forces it (NVIDIA_TF32_OVERRIDE); kPedantic: not even
// then.
enum class Gemm { kAsIs, kTf32, kPedantic };

struct DenseOptions {
  bool float64_work = false;  // products in float64, whatever the weights
  double tol = 1e-3;
  uint64_t seed = 0;
  int64_t temporary_bytes = int64_t{128} << 20;  // of float64 copies made on the way
};

class DenseCuda {
 public:
  using Array = CudaArray;
  // Cholesky QR with a shift, then twice without need of it (shifted CholeskyQR3: Fukaya et al., arXiv 1809.11085). The
  // third changes nothing where the second has found orthonormal columns, and orthonormalise() leaves it out there.
  static constexpr int kRounds = 3;
  static constexpr bool kLockstep = true;  // a batch of matrices iterates together

  // weights: finite matrices [d, k], row-major and contiguous, in device memory. Takes one scaled copy.
  DenseCuda(Context& context, const std::vector<const void*>& weights, Type type, const core::SvdPlan& plan,
            const DenseOptions& options, const std::vector<uint64_t>& keys);

  int64_t batch() const { return static_cast<int64_t>(positions_.size()); }
  const core::SvdPlan& plan() const { return plan_; }
  Context& context() const { return *context_; }

  // -- storage (dense_cuda.cpp) ---------------------------------------------------------------------------------------
  Array empty(int64_t rows, int64_t cols) const { return array(rows, cols, work_); }
  static Array columns(const Array& a, int64_t begin, int64_t count);
  void copy(const Array& target, const Array& source) const;  // nothing to do where they are one
  Array clone(const Array& a) const;
  Array select(const Array& a, const std::vector<int64_t>& positions) const;
  void insert(const Array& target, int64_t b, const Array& source, int64_t from) const;
  DenseCuda only(const std::vector<int64_t>& positions) const;

  // -- products (dense_cuda.cpp) --------------------------------------------------------------------------------------
  void times(const Array& x, const Array& y) const { multiply(x, y, /*back=*/false, iteration_); }  // y = A x
  void times_exactly(const Array& x, const Array& y) const { multiply(x, y, /*back=*/false, exact_, Gemm::kPedantic); }
  Array transposed_times_exactly(const Array& y) const;  // A^T y
  // y = A x; A^T y, made in `place`, and the lengths of y's columns.
  std::pair<Array, Array> times_and_back(const Array& x, const Array& y, const Array& place) const;
  Array product(const Array& x, const Array& q) const;
  void project_out(const Array& z, const Array& v) const;  // z -= v (v^T z)
  // v[:, :keep] = v[:, :width] q[:, :keep], and y the same.
  void rotate(const Array& v, const Array& y, const Array& q, int64_t width, int64_t keep) const;

  // -- orthonormalisation (dense_cuda_factor.cpp) ---------------------------------------------------------------------
  Array orthonormal_gaussian();
  Array probe_gaussian(int64_t count, int64_t turn);
  Array zero_norms(int64_t count) const;
  Array column_norms(const Array& a) const;  // float64 [B, 1, cols]
  void drop_noise(const Array& z, const Array& norms);
  // One round; at most kMostColumns columns are changed in place, others come in an array of their own.
  double cholesky_qr(Array& z);
  void orthonormalise(Array& z, const Array& v, const Array& norms);
  Array take_lengths(const Array& a);

  // -- Rayleigh-Ritz (dense_cuda_factor.cpp) --------------------------------------------------------------------------
  std::pair<Array, Array> gram_eigen(const Array& y);
  Array largest_value(const Array& y) const;
  Array largest_tails(const Array& q, int64_t block, int64_t rank) const;
  Array ritz_residuals(const Array& v, const Array& y, const Array& lambda, const Array& which,
                       const Array& place) const;  // made in `place`
  Array ritz_values(const Array& lambda, const Array& which) const;
  std::vector<double> relative_size(const Array& r, const Array& lambda, const Array& which) const;
  // A basis [B, cols, rank] of the leading right singular vectors, from the eigenvectors of A^T A.
  Array gram_vectors();

  // -- the answer (dense_cuda_answer.cpp) -----------------------------------------------------------------------------
  struct Certificate {
    Array u, s, v;  // as they are handed out
    Array stored;   // s scaled back, float64
    Array sizes;    // |A^T u - s v|
    Array defect_u, defect_v;
  };
  // Measures everything, whatever the tolerance.
  Certificate certify(const Array& left, const Array& s, const Array& right, double tol) const;
  // Found::residuals lies in host memory, the other arrays on the device. Throws std::range_error where a singular
  // value is beyond the range of the factors' type.
  std::vector<core::Candidate<Array>> report(const Certificate& certificate, const Array& values, const Array* seen,
                                             double tol) const;

 private:
  struct Eigen {
    Array lambda, q, sigma;
  };

  cudaStream_t stream() const { return context_->stream; }
  double epsilon() const { return work_ == Type::kFloat64 ? 0x1p-52 : 0x1p-23; }
  Array array(int64_t rows, int64_t cols, Type type, int64_t batch) const;
  Array array(int64_t rows, int64_t cols, Type type) const { return array(rows, cols, type, batch()); }
  Array wide(const Matrices& a) const;  // a itself, or a copy, in float64
  Random random() { return {keys_.as<uint64_t>(), draws_++}; }

  Noise noise(const Array& norms);
  void cholesky_round(const Array& z, const Noise& noise, const int* wanted, int* again);
  void cholesky_qr_by_libraries(Array& z);

  void multiply(const Array& x, const Array& y, bool back, const core::Precision& how, Gemm kind = Gemm::kAsIs) const;
  void multiply_stored(const Array& x, const Array& y, bool back, Gemm kind) const;
  Array split(const Array& x, int terms, const Array* which = nullptr) const;
  // y = A x or A^T x of terms of x; with `next`, their terms of y and the lengths of its columns.
  void multiply_terms(const Array& terms, const Array& y, bool back, int count, const Array* next = nullptr,
                      double* norms = nullptr) const;
  Array gram(const Array& y) const;
  Eigen eigen(const Array& gram) const;
  Array residual_product(const Array& u) const;
  Array defect(const Array& a) const;

  Context* context_;
  core::SvdPlan plan_;
  Type work_, out_;
  core::Precision iteration_, exact_;
  int64_t temporary_bytes_, d_, k_;
  Array weights_;                       // [ld, d] each, ld >= k; scaled by 2^-exponent; never written again
  std::vector<int64_t> positions_;      // of the matrices of this batch among the weights
  double floor_, noise_;                // of rounding, over sigma_1
  Array keys_, exponents_, frobenius_;  // one number per matrix
  Array failed_;                        // 1 where a solver failed
  Array sigma_;                         // largest singular value seen so far
  bool ritz_ = false;                   // by a Rayleigh-Ritz
  uint32_t draws_ = 0;                  // random streams used so far
};
static_assert(core::Dense<DenseCuda>);

// -- products of whole batches (gemm.cpp) -----------------------------------------------------------------------------
struct Operand {
  Matrices matrices;  // as it is stored
  bool transposed = false;
};
// c = alpha a b + beta c; c's shape decides, `inner` is the length of the sums. Leading dimensions: the stored rows.
void gemm(const Context& context, const Operand& a, const Operand& b, const Matrices& c, int64_t inner,
          double alpha = 1, double beta = 0, Gemm how = Gemm::kAsIs);

// `count` of them from `first` on.
Matrices slice(const Matrices& matrices, int64_t first, int64_t count);

// -- cuSOLVER's symmetric eigenvectors (symmetric.cpp) ----------------------------------------------------------------
// Eigenvectors overwrite a [n, n], ascending eigenvalues go to w [batch, n], 0 or not to info [batch]. Of many small
// ones at once, and of one after the other.
void symmetric_eigenvectors(const Context& context, const Matrices& a, void* w, int* info);
void symmetric_eigenvectors_one(const Context& context, const Matrices& a, void* w, int* info);

}  // namespace osora::cuda
