// SPDX-License-Identifier: Apache-2.0
// What every call into cuBLAS and cuSOLVER needs: handles, a stream, memory. No torch here: csrc/torch/svd/on_cuda.cpp
// brings the stream and the memory of torch.
#pragma once
#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#include <cusolverDn.h>

#include <cstddef>
#include <memory>

namespace osora::cuda {

// Where device memory comes from. A buffer goes back when its last owner lets go; the work queued on the stream before
// that may still use it (torch's caching allocator is stream-ordered), so nobody has to wait for it.
class Allocator {
 public:
  virtual ~Allocator() = default;
  // `bytes` of device memory, aligned to 256 bytes or more; uninitialised. Throws where there is none.
  virtual std::shared_ptr<void> allocate(size_t bytes) = 0;
};

// Handles of this thread for the current device, with their stream set to `stream`. Made at the first call, kept as
// long as the thread lives. The handles are of torch-independent cuBLAS and cuSOLVER state: math mode default, own
// workspace, so that results do not depend on what else the process does with torch's handles.
struct Context {
  cublasHandle_t blas = nullptr;
  cusolverDnHandle_t solver = nullptr;
  cusolverDnParams_t params = nullptr;  // CUSOLVERDN_SYEVBATCHED set to CUSOLVER_ALG_1, where the library takes it
  cudaStream_t stream = nullptr;
  int device = -1;
  int capability = 0;  // 90 for compute capability 9.0
  Allocator* memory = nullptr;
  std::shared_ptr<void> workspace;  // of cuBLAS, from `memory`; kept until the next call of context()
};
Context& context(cudaStream_t stream, Allocator& memory);

// Of the library that is loaded: 11701 for 11.7.1.
int solver_version();
// XsyevBatched came with cuSOLVER 11.7.1 (CUDA 12.6.2): in the headers and in the library that is loaded.
bool has_batched_eigen();

// Copies to the host by way of pinned memory and waits for it: once, for everything queued on the stream before.
void read_back(const Context& context, void* host, const void* device, size_t bytes);

// Throw std::runtime_error with the call's name and the status in words.
void check(cudaError_t status, const char* call);
void check(cublasStatus_t status, const char* call);
void check(cusolverStatus_t status, const char* call);

}  // namespace osora::cuda
