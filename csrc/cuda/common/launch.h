// SPDX-License-Identifier: Apache-2.0
// launch(): the only <<<>>> of the project. tests/emulation stands in for <cuda_runtime.h>, defines OSORA_EMULATED and
// brings its own launch() and dynamic_shared(), so that the same .cu files run on a CPU.
#pragma once
#include <cuda_runtime.h>

#ifndef OSORA_EMULATED
#include <stdexcept>
#include <string>

namespace osora::cuda {

inline void check_launch(cudaError_t status) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("osora: kernel launch: ") + cudaGetErrorString(status));
}

// Queues kernel(args...) on `stream`. A kernel that calls dynamic_shared() needs its size here, in bytes.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Arguments... arguments) {
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  check_launch(cudaGetLastError());
}

// The block's dynamic shared memory, 16-byte aligned; uninitialised.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  return reinterpret_cast<T*>(shared_bytes);
}

}  // namespace osora::cuda
#endif
