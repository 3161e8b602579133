// SPDX-License-Identifier: Apache-2.0
// What both halves of the self test need: device arrays, handles, sizes of workspaces.
#pragma once
#include <ATen/Functions.h>
#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#include <cusolverDn.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "call.h"
#include "memory.h"

namespace osora::standins {

// A right case throws Wrong where a number or a status is not what it should be. A wrong case returns the status of the
// call that should be refused.
struct Wrong : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct Case {
  std::string name;
  std::function<int()> run;
};
std::vector<Case> right_cases();
std::vector<Case> wrong_cases();

template <class... Parts>
void expect(bool condition, const Parts&... parts) {
  if (!condition) throw Wrong(text(parts...));
}
template <class Status>
void ok(Status status) {
  expect(status == static_cast<Status>(0), "refused with status ", static_cast<int>(status));
}

// Device memory for `batch` column-major matrices [rows, columns], all NaN.
struct Device {
  Device(at::ScalarType type, int64_t rows, int64_t columns, int64_t ld = 0, int64_t batch = 1, int64_t gap = 0)
      : rows(rows), columns(columns), ld(ld ? ld : std::max<int64_t>(1, rows)), batch(batch) {
    stride = this->ld * columns + gap;
    const int64_t numbers = batch * stride;
    memory = allocate(static_cast<size_t>(numbers) * at::elementSize(type));
    flat = at::from_blob(memory.get(), {numbers}, at::TensorOptions().dtype(type));
    all = flat.as_strided({batch, rows, columns}, {stride, 1, this->ld});
    before = flat.clone();
  }
  Device& fill(const at::Tensor& values) {
    all.copy_(values);
    before = flat.clone();
    return *this;
  }
  template <class T = float>
  T* data(int64_t index = 0) const {
    return static_cast<T*>(memory.get()) + index * stride;
  }
  at::Tensor exact() const { return all.to(at::kDouble).clone(); }
  // The numbers between the columns and between the matrices are what they were: NaN.
  void expect_gaps_untouched() const {
    at::Tensor now = flat.clone();
    now.as_strided(all.sizes(), all.strides()).zero_();
    at::Tensor then = before.clone();
    then.as_strided(all.sizes(), all.strides()).zero_();
    expect(at::isnan(now).equal(at::isnan(then)), "the numbers between the columns were written to");
  }
  int64_t rows, columns, ld, batch, stride;
  std::shared_ptr<void> memory;
  at::Tensor flat, all, before;
};

// Pointers to the matrices of `of`, in device memory.
template <class T>
struct Pointers {
  explicit Pointers(const Device& of) : memory(allocate(static_cast<size_t>(of.batch) * sizeof(T*))) {
    for (int64_t k = 0; k < of.batch; ++k) data()[k] = of.data<T>(k);
  }
  T** data() const { return static_cast<T**>(memory.get()); }
  std::shared_ptr<void> memory;
};

struct Info {
  explicit Info(int64_t count) : memory(allocate(static_cast<size_t>(count) * sizeof(int))) {}
  int* data() const { return static_cast<int*>(memory.get()); }
  int operator[](int64_t k) const { return data()[k]; }
  std::shared_ptr<void> memory;
};

struct Handles {
  Handles() {
    ok(cublasCreate(&blas));
    ok(cublasSetStream(blas, stream()));
    ok(cusolverDnCreate(&solver));
    ok(cusolverDnSetStream(solver, stream()));
    ok(cusolverDnCreateParams(&params));
    ok(cusolverDnSetAdvOptions(params, CUSOLVERDN_SYEVBATCHED, CUSOLVER_ALG_1));
  }
  ~Handles() {
    cublasDestroy(blas);
    cusolverDnDestroyParams(params);
    cusolverDnDestroy(solver);
  }
  cublasHandle_t blas = nullptr;
  cusolverDnHandle_t solver = nullptr;
  cusolverDnParams_t params = nullptr;
};

// Both halves of a workspace of the size that was asked for; the device half is zero.
struct Room {
  Room(size_t device_bytes, size_t host_bytes)
      : device_bytes(device_bytes), host_bytes(host_bytes), device(allocate(device_bytes)), host(host_bytes) {
    ok(cudaMemsetAsync(device.get(), 0, device_bytes, stream()));
  }
  size_t device_bytes, host_bytes;
  std::shared_ptr<void> device;
  std::vector<char> host;
};

inline cudaDataType type_of(at::ScalarType type) {
  return type == at::kDouble  ? CUDA_R_64F
         : type == at::kFloat ? CUDA_R_32F
         : type == at::kHalf  ? CUDA_R_16F
                              : CUDA_R_16BF;
}

inline double relative_error(const at::Tensor& computed, const at::Tensor& exact) {
  if (exact.numel() == 0) return 0;
  const double scale = std::max(1e-30, exact.abs().max().item<double>());
  const double error = computed.to(at::kDouble).sub(exact).abs().max().item<double>();
  return error / scale;  // NaN where a number is NaN
}
inline void expect_near(const at::Tensor& computed, const at::Tensor& exact, double allowed, const std::string& what) {
  const double error = relative_error(computed, exact);
  expect(error <= allowed, what, ": relative error ", error, ", allowed ", allowed);
}

}  // namespace osora::standins
