// SPDX-License-Identifier: Apache-2.0
// What each driver wants is in cuSOLVER's manual, section "Dense Eigenvalue Solver Reference"; what it leaves open or
// contradicts is said beside the call. CUDA 12.4 has all of it.
#include "cuda/svd/svd_drivers.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/svd_drivers_limits.h"

namespace osora::cuda {
namespace {

using core::SvdMethod;

constexpr int64_t kPowerIterations = 2;  // of gesvdr, as the manual recommends
constexpr int kMaxSweeps = 400;          // of gesvdj: torch's number; the library's is 100
constexpr signed char kThin = 'S';       // U [rows, cols], V [cols, cols]: the leading columns, no more

// The older interface has a name for each type.
template <class T>
struct Older;
template <>
struct Older<float> {
  static constexpr cudaDataType type = CUDA_R_32F;
  static constexpr auto gesvdj_size = &cusolverDnSgesvdj_bufferSize;
  static constexpr auto gesvdj = &cusolverDnSgesvdj;
  static constexpr auto gesvda_size = &cusolverDnSgesvdaStridedBatched_bufferSize;
  static constexpr auto gesvda = &cusolverDnSgesvdaStridedBatched;
};
template <>
struct Older<double> {
  static constexpr cudaDataType type = CUDA_R_64F;
  static constexpr auto gesvdj_size = &cusolverDnDgesvdj_bufferSize;
  static constexpr auto gesvdj = &cusolverDnDgesvdj;
  static constexpr auto gesvda_size = &cusolverDnDgesvdaStridedBatched_bufferSize;
  static constexpr auto gesvda = &cusolverDnDgesvdaStridedBatched;
};

template <class T>
struct Job {
  Context& context;
  SvdMethod method;
  T* a;
  int64_t rows, cols, rank;
  T *u = nullptr, *s = nullptr, *v = nullptr;  // leading dimensions rows and cols
  std::string name = core::svd_method_names()[size_t(method)];
  std::vector<std::shared_ptr<void>> buffers = {};

  template <class Number>
  Number* allocate(int64_t count) {
    buffers.push_back(context.memory->allocate(size_t(std::max<int64_t>(1, count)) * sizeof(Number)));
    return static_cast<Number*>(buffers.back().get());
  }
  DriverFactors factors(int64_t u_columns, int64_t v_columns) {
    u = allocate<T>(rows * u_columns);
    s = allocate<T>(cols);
    v = allocate<T>(cols * v_columns);
    return {{buffers[0], 1, rows}, buffers[1], {buffers[2], 1, cols}};
  }
};

// Asks for the size of the workspace, takes it, runs, and waits for the info.
template <class T, class Size, class Run>
void solve(Job<T>& job, Size size, Run run) {
  size_t device_bytes = 0, host_bytes = 0;
  check(size(&device_bytes, &host_bytes), (job.name + ", workspace size").c_str());
  char* device = job.template allocate<char>(int64_t(device_bytes));
  std::vector<char> host(host_bytes);
  int* info = job.template allocate<int>(1);
  check(run(device, device_bytes, host.data(), host_bytes, info), job.name.c_str());
  int found = 0;
  read_back(job.context, &found, info, sizeof(int));
  const std::string info_text = "(info = " + std::to_string(found) + ")";
  if (found > 0) throw core::DriverFailed("cuSOLVER's " + job.name + " did not converge " + info_text);
  if (found < 0) throw std::runtime_error("cuSOLVER's " + job.name + " found one of its arguments wrong " + info_text);
}

// The older interface: sizes in int, the workspace on the device alone and counted in numbers.
template <class T, class Size, class Run>
void solve_older(Job<T>& job, Size size, Run run) {
  int numbers = 0;
  const auto bytes = [&](size_t* device, size_t*) {
    const cusolverStatus_t status = size(&numbers);
    core::refuse_workspace(job.method, numbers);
    *device = size_t(numbers) * sizeof(T);
    return status;
  };
  solve(job, bytes, [&](char* device, size_t, char*, size_t, int* info) {
    return run(reinterpret_cast<T*>(device), numbers, info);
  });
}

// QR iteration; m >= n only. The one driver that returns V^T.
template <class T>
DriverFactors gesvd(Job<T>& j) {
  constexpr auto type = Older<T>::type;
  DriverFactors found = j.factors(j.cols, j.cols);
  solve(
      j,
      [&](size_t* device, size_t* host) {
        return cusolverDnXgesvd_bufferSize(j.context.solver, j.context.params, kThin, kThin, j.rows, j.cols, type, j.a,
                                           j.rows, type, j.s, type, j.u, j.rows, type, j.v, j.cols, type, device, host);
      },
      [&](void* device, size_t device_bytes, void* host, size_t host_bytes, int* info) {
        return cusolverDnXgesvd(j.context.solver, j.context.params, kThin, kThin, j.rows, j.cols, type, j.a, j.rows,
                                type, j.s, type, j.u, j.rows, type, j.v, j.cols, type, device, device_bytes, host,
                                host_bytes, info);
      });
  std::swap(found.v.row_stride, found.v.column_stride);
  return found;
}

struct DestroyJacobi {
  void operator()(gesvdjInfo* params) const { cusolverDnDestroyGesvdjInfo(params); }
};

// One-sided Jacobi, to the rounding level of T.
template <class T>
DriverFactors gesvdj(Job<T>& j) {
  const int m = int(j.rows), n = int(j.cols);
  DriverFactors found = j.factors(j.cols, j.cols);
  gesvdjInfo_t params = nullptr;
  check(cusolverDnCreateGesvdjInfo(&params), "cusolverDnCreateGesvdjInfo");
  const std::unique_ptr<gesvdjInfo, DestroyJacobi> owner(params);
  check(cusolverDnXgesvdjSetTolerance(params, std::numeric_limits<T>::epsilon()), "cusolverDnXgesvdjSetTolerance");
  check(cusolverDnXgesvdjSetMaxSweeps(params, kMaxSweeps), "cusolverDnXgesvdjSetMaxSweeps");
  solve_older(
      j,
      [&](int* numbers) {
        return Older<T>::gesvdj_size(j.context.solver, CUSOLVER_EIG_MODE_VECTOR, /*econ=*/1, m, n, j.a, m, j.s, j.u, m,
                                     j.v, n, numbers, params);
      },
      [&](T* work, int numbers, int* info) {
        return Older<T>::gesvdj(j.context.solver, CUSOLVER_EIG_MODE_VECTOR, /*econ=*/1, m, n, j.a, m, j.s, j.u, m, j.v,
                                n, work, numbers, info, params);
      });
  return found;
}

// Polar decomposition, then symmetric eigenvectors.
template <class T>
DriverFactors gesvdp(Job<T>& j) {
  constexpr auto type = Older<T>::type;
  DriverFactors found = j.factors(j.cols, j.cols);
  // How far singular values near zero were moved. Not handed on: whoever certifies the factors measures what it did.
  double moved = 0;
  solve(
      j,
      [&](size_t* device, size_t* host) {
        return cusolverDnXgesvdp_bufferSize(j.context.solver, j.context.params, CUSOLVER_EIG_MODE_VECTOR, /*econ=*/1,
                                            j.rows, j.cols, type, j.a, j.rows, type, j.s, type, j.u, j.rows, type, j.v,
                                            j.cols, type, device, host);
      },
      [&](void* device, size_t device_bytes, void* host, size_t host_bytes, int* info) {
        return cusolverDnXgesvdp(j.context.solver, j.context.params, CUSOLVER_EIG_MODE_VECTOR, /*econ=*/1, j.rows,
                                 j.cols, type, j.a, j.rows, type, j.s, type, j.u, j.rows, type, j.v, j.cols, type,
                                 device, device_bytes, host, host_bytes, info, &moved);
      });
  return found;
}

// Eigenvectors of A^T A; m >= n only. `rank` is how many are returned, the work is for all. U of a singular value far
// below sigma_1 may not be finite (github.com/pytorch/pytorch/issues/136085: a matrix of zeros).
template <class T>
DriverFactors gesvda(Job<T>& j) {
  const int m = int(j.rows), n = int(j.cols), rank = int(j.rank);
  const long long a_stride = j.rows * j.cols, u_stride = j.rows * j.rank, v_stride = j.cols * j.rank;
  DriverFactors found = j.factors(j.rank, j.rank);
  solve_older(
      j,
      [&](int* numbers) {
        return Older<T>::gesvda_size(j.context.solver, CUSOLVER_EIG_MODE_VECTOR, rank, m, n, j.a, m, a_stride, j.s,
                                     rank, j.u, m, u_stride, j.v, n, v_stride, numbers, /*batchSize=*/1);
      },
      [&](T* work, int numbers, int* info) {
        return Older<T>::gesvda(j.context.solver, CUSOLVER_EIG_MODE_VECTOR, rank, m, n, j.a, m, a_stride, j.s, rank,
                                j.u, m, u_stride, j.v, n, v_stride, work, numbers, info,
                                /*h_R_nrmF=*/nullptr,  // a residual that would cost a product and a wait
                                /*batchSize=*/1);
      });
  return found;
}

// Randomised subspace iteration. It takes no seed. The manual's sizes of U and V contradict each other; NVIDIA's sample
// (CUDALibrarySamples, Xgesvdr) gives both in full, U [m, m] and V [n, n], and so do we.
template <class T>
DriverFactors gesvdr(Job<T>& j) {
  constexpr auto type = Older<T>::type;
  const int64_t more = core::gesvdr_oversampling(j.cols, j.rank);
  DriverFactors found = j.factors(j.rows, j.cols);
  solve(
      j,
      [&](size_t* device, size_t* host) {
        return cusolverDnXgesvdr_bufferSize(j.context.solver, j.context.params, kThin, kThin, j.rows, j.cols, j.rank,
                                            more, kPowerIterations, type, j.a, j.rows, type, j.s, type, j.u, j.rows,
                                            type, j.v, j.cols, type, device, host);
      },
      [&](void* device, size_t device_bytes, void* host, size_t host_bytes, int* info) {
        return cusolverDnXgesvdr(j.context.solver, j.context.params, kThin, kThin, j.rows, j.cols, j.rank, more,
                                 kPowerIterations, type, j.a, j.rows, type, j.s, type, j.u, j.rows, type, j.v, j.cols,
                                 type, device, device_bytes, host, host_bytes, info);
      });
  return found;
}

}  // namespace

template <class T>
DriverFactors svd_driver(Context& context, SvdMethod method, T* a, int64_t rows, int64_t cols, int64_t rank) {
  constexpr DriverFactors (*drivers[])(Job<T>&) = {gesvd, gesvdj, gesvdp, gesvda, gesvdr};  // in SvdMethod's order
  Job<T> job{context, method, a, rows, cols, rank};
  return drivers[int64_t(method) - int64_t(SvdMethod::kGesvd)](job);
}

template DriverFactors svd_driver(Context&, SvdMethod, float*, int64_t, int64_t, int64_t);
template DriverFactors svd_driver(Context&, SvdMethod, double*, int64_t, int64_t, int64_t);

}  // namespace osora::cuda
