// SPDX-License-Identifier: Apache-2.0
// What a test may ask of the stand-ins for the CUDA runtime, cuBLAS and cuSOLVER. No CUDA header here, so that code
// compiled with the emulator's <cuda_runtime.h> can include it too.
//
// The stand-ins do what csrc/cuda asks on the host, at once, through torch's LAPACK. What the manuals forbid they
// refuse: the call returns the library's error, and the reason is kept in refusals() and printed to stderr.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

struct CUstream_st;

namespace osora::standins {

// The stream that every handle and every call must name. It points to nothing.
CUstream_st* stream();

struct Settings {
  int capability = 90;           // 90 for compute capability 9.0
  int cublas_version = 130101;   // major * 10000 + minor * 100 + patch, as CUBLAS_VERSION
  int cusolver_version = 12004;  // major * 1000 + minor * 100 + patch, as CUSOLVER_VERSION; XsyevBatched came in 11701
  bool capturing = false;        // a CUDA graph is being recorded: nobody may wait for the device
  bool packs_of_16_bytes =
      true;  // refuse 16-bit operands of a product that are not aligned to 16 bytes: right but slow
  int64_t cheap_batch =
      32768;                   // above it XsyevBatched wants 4 GiB of workspace; cuSOLVER's can be many times its input
  int64_t rounding = 0;        // a seed: products get rounding errors of another machine (tests/rounding); 0: none
  bool own_workspace = false;  // refuse cuBLAS calls without cublasSetWorkspace since the last cublasSetStream
};
Settings& settings();

struct Counts {
  std::map<std::string, int64_t> calls;  // by name, refused ones too
  int64_t host_waits = 0;                // the host waited for the device, copies to pageable memory included
  int64_t live_bytes = 0, peak_bytes = 0, live_allocations = 0;  // device memory; peak since reset()
  int64_t live_objects = 0;                                      // handles, parameters, events, pinned memory
};
Counts counts();

std::vector<std::string> refusals();

// For the emulator's launch(): counted as "launch", refused on another stream.
void observe_launch(const CUstream_st* on);

// The `nth` call of `call` from now on (1: the next) goes wrong: it returns `status` and does nothing; or, where
// `status` is 0, it writes `info` for the matrix `matrix` of the batch, and that matrix's results are NaN. "allocate"
// is a call.
struct Fault {
  std::string call;
  int64_t nth = 1;
  int status = 0;
  int info = 0;
  int64_t matrix = 0;
};
void inject(const Fault& fault);
int64_t faults_left();

// Forgets counts, refusals, faults, queried workspace sizes, queued copies and settings. Memory and handles stay.
void reset();

}  // namespace osora::standins
