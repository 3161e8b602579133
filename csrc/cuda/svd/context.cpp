// SPDX-License-Identifier: Apache-2.0
#include "cuda/svd/context.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace osora::cuda {
namespace {

[[noreturn]] void fail(const char* call, const std::string& why) { throw std::runtime_error(call + (": " + why)); }

struct Handles {
  Context context;
  void* pinned = nullptr;
  size_t pinned_bytes = 0;
};

// Handles that no thread uses, by device. Never destroyed: at the end of a process CUDA may be gone before us.
struct Pool {
  std::mutex mutex;
  std::multimap<int, Handles> idle;
};
Pool& pool() {
  static Pool& all = *new Pool;
  return all;
}

Handles make_handles(int device) {
  Handles made;
  Context& context = made.context;
  context.device = device;
  check(cublasCreate(&context.blas), "cublasCreate");
  check(cublasSetPointerMode(context.blas, CUBLAS_POINTER_MODE_HOST), "cublasSetPointerMode");
  check(cublasSetMathMode(context.blas, CUBLAS_DEFAULT_MATH), "cublasSetMathMode");
  check(cusolverDnCreate(&context.solver), "cusolverDnCreate");
  check(cusolverDnSetDeterministicMode(context.solver, CUSOLVER_DETERMINISTIC_RESULTS),
        "cusolverDnSetDeterministicMode");
  check(cusolverDnCreateParams(&context.params), "cusolverDnCreateParams");
  return made;
}

// What this thread has taken out of the pool; it goes back when the thread ends.
struct OfThread {
  std::map<int, Handles> of_device;
  ~OfThread() {
    const std::lock_guard lock(pool().mutex);
    for (auto& [device, handles] : of_device) {
      handles.context.workspace.reset();
      pool().idle.emplace(device, std::move(handles));
    }
  }
};

Handles& handles_of(int device) {
  static thread_local OfThread mine;
  if (const auto found = mine.of_device.find(device); found != mine.of_device.end()) return found->second;
  const std::lock_guard lock(pool().mutex);
  if (auto node = pool().idle.extract(device)) {
    return mine.of_device.emplace(device, std::move(node.mapped())).first->second;
  }
  return mine.of_device.emplace(device, make_handles(device)).first->second;
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

}  // namespace

void check(cudaError_t status, const char* call) {
  if (status != cudaSuccess) fail(call, cudaGetErrorString(status));
}
void check(cublasStatus_t status, const char* call) {
  if (status != CUBLAS_STATUS_SUCCESS) fail(call, cublasGetStatusString(status));
}
void check(cusolverStatus_t status, const char* call) {
  // cuSOLVER has no text of its own; cusolver_common.h lists the numbers.
  if (status != CUSOLVER_STATUS_SUCCESS) fail(call, "cuSOLVER status " + std::to_string(static_cast<int>(status)));
}

int solver_version() {
  int major = 0, minor = 0, patch = 0;
  check(cusolverGetProperty(MAJOR_VERSION, &major), "cusolverGetProperty");
  check(cusolverGetProperty(MINOR_VERSION, &minor), "cusolverGetProperty");
  check(cusolverGetProperty(PATCH_LEVEL, &patch), "cusolverGetProperty");
  return major * 1000 + minor * 100 + patch;
}

bool has_batched_eigen() {
#if CUSOLVER_VERSION >= 11701
  return solver_version() >= 11701;
#else
  return false;
#endif
}

Context& context(cudaStream_t stream, Allocator& memory) {
  const int device = current_device();
  Context& context = handles_of(device).context;
  context.stream = stream;
  context.memory = &memory;
  context.capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
  check(cublasSetStream(context.blas, stream), "cublasSetStream");  // it also takes the workspace away
  // The sizes that the cuBLAS manual recommends.
  const size_t bytes = size_t{context.capability >= 90 ? 32u : 4u} << 20;
  context.workspace = memory.allocate(bytes);
  check(cublasSetWorkspace(context.blas, context.workspace.get(), bytes), "cublasSetWorkspace");
  check(cusolverDnSetStream(context.solver, stream), "cusolverDnSetStream");
#if CUSOLVER_VERSION >= 11701
  if (has_batched_eigen()) {
    // A library that refuses it goes on with its own choice.
    static_cast<void>(cusolverDnSetAdvOptions(context.params, CUSOLVERDN_SYEVBATCHED, CUSOLVER_ALG_1));
  }
#endif
  return context;
}

void read_back(const Context& context, void* host, const void* device, size_t bytes) {
  Handles& mine = handles_of(context.device);
  if (mine.pinned_bytes < bytes) {
    // The old one is given up, not freed: cudaFreeHost waits for the whole device.
    const size_t wish = std::max({bytes, 2 * mine.pinned_bytes, size_t{64} << 10});
    check(cudaMallocHost(&mine.pinned, wish), "cudaMallocHost");
    mine.pinned_bytes = wish;
  }
  check(cudaMemcpyAsync(mine.pinned, device, bytes, cudaMemcpyDeviceToHost, context.stream), "cudaMemcpyAsync");
  check(cudaStreamSynchronize(context.stream), "cudaStreamSynchronize");
  std::memcpy(host, mine.pinned, bytes);
}

}  // namespace osora::cuda
