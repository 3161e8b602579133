// SPDX-License-Identifier: Apache-2.0
// Kernels with one bug each, to show that the emulator and the sanitizers catch what they are for.
//   planted_bugs --list     the names
//   planted_bugs NAME       exit 0: nobody noticed; 3: wrong numbers came out; 4: launch() refused; else: a report
// The last names, drop-barrier-N, run the real code of csrc/cuda (common/reduce.cuh, fold/fold.cu, linear/decode.cu)
// without its Nth __syncthreads; drop-barrier-svd-N that of planted_bugs_svd.cpp.
#include <cmath>
#include <cstdio>
#include <exception>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "cuda/common/half.cuh"
#include "cuda/common/launch.h"

namespace {
int dropped_barrier = -1;
constexpr int kFirstBarrier = __COUNTER__ + 1;
void numbered_barrier(int number, osora::emulation::Site site = osora::emulation::Site::current()) {
  if (number - kFirstBarrier != dropped_barrier) osora::emulation::block_barrier(site);
}
}  // namespace
#define __syncthreads() numbered_barrier(__COUNTER__)
// The real sources, with barriers that can be left out. The kernels of svd_kernels.cu have those of reduce.cuh alone.
#include "cuda/common/reduce.cuh"
// clang-format off: reduce.cuh has the first numbers
#include "cuda/fold/fold.cu"  // NOLINT
#include "cuda/linear/decode.cu"  // NOLINT
// clang-format on
#undef __syncthreads
constexpr int kBarriers = __COUNTER__ - kFirstBarrier;

int svd_barriers();
bool right_without_svd_barrier(int number);

namespace {

using osora::cuda::dynamic_shared;
using osora::cuda::launch;
constexpr int kNoticedNothing = 0, kWrongNumbers = 3, kRefused = 4;
constexpr unsigned kAllLanes = 0xffffffffu;

int expect(bool right) { return right ? kNoticedNothing : kWrongNumbers; }

// A guard that lets one thread too many pass.
__global__ void read_past_end_kernel(const float* x, float* y, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= count) y[i] = x[i];
}
int read_past_end() {
  const std::vector<float> x(1000, 1.0f);
  std::vector<float> y(1001);
  launch(read_past_end_kernel, 8, 128, 0, nullptr, x.data(), y.data(), 1000);
  return expect(y[1] == 1 && y[999] == 1);
}

// 16 bytes from an address that is only a multiple of 4.
__global__ void misaligned_pack_kernel(const float* x, float* y) {
  float values[4];
  osora::cuda::load(x + 4 * threadIdx.x + 1, values);
  y[threadIdx.x] = values[0];
}
int misaligned_pack() {
  const std::vector<float> x(132, 1.0f);
  std::vector<float> y(32);
  launch(misaligned_pack_kernel, 1, 32, 0, nullptr, x.data(), y.data());
  return expect(y[31] == 1);
}

__global__ void barrier_for_some_kernel(float* y) {
  if (threadIdx.x < 16) __syncthreads();
  y[threadIdx.x] = 1;
  __syncwarp();
}
__global__ void two_barriers_kernel(float* y) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = 1;
}
__global__ void barrier_after_exit_kernel(float* y) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
  y[threadIdx.x] = 1;
}
__global__ void mask_names_absent_lanes_kernel(float* y) {
  float value = threadIdx.x;
  if (threadIdx.x < 16) value = __shfl_xor_sync(kAllLanes, value, 1);
  y[threadIdx.x] = value;
}
__global__ void source_outside_mask_kernel(float* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.0f, 16);
}
__global__ void own_lane_not_in_mask_kernel(float* y) { y[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 0); }
__global__ void masks_differ_kernel(float* y) {
  const unsigned mask = threadIdx.x % 2 ? kAllLanes : 0x7fffffffu;
  if (threadIdx.x < 31) y[threadIdx.x] = __shfl_sync(mask, 1.0f, 0);
}
int run_simple(void (*kernel)(float*), unsigned threads) {
  std::vector<float> y(threads);
  launch(kernel, 1, threads, 0, nullptr, y.data());
  return kNoticedNothing;
}

// Blocks have no order: this only looks right because the emulator runs one after the other.
__global__ void blocks_race_kernel(float* y) { y[0] += 1; }
int blocks_race() {
  std::vector<float> y(1);
  launch(blocks_race_kernel, 4, 1, 0, nullptr, y.data());
  return expect(y[0] == 4);
}

// A lane reads what its lower neighbour wrote, with no __syncwarp between: right only when lanes run upwards.
__global__ void missing_syncwarp_kernel(float* y) {
  float* const shared = dynamic_shared<float>();
  shared[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = shared[threadIdx.x & ~1u];
}
int missing_syncwarp() {
  std::vector<float> y(32);
  launch(missing_syncwarp_kernel, 1, 32, 32 * sizeof(float), nullptr, y.data());
  bool right = true;
  for (int lane = 0; lane < 32; ++lane) right = right && y[lane] == static_cast<float>(lane & ~1);
  return expect(right);
}

__global__ void shared_overrun_kernel(float* y) {
  float* const shared = dynamic_shared<float>();
  shared[threadIdx.x + 1] = 1;
  __syncthreads();
  y[threadIdx.x] = threadIdx.x ? shared[threadIdx.x] : 1;
}
int shared_overrun() {
  std::vector<float> y(128);
  launch(shared_overrun_kernel, 1, 128, 128 * sizeof(float), nullptr, y.data());
  return expect(y[0] == 1 && y[127] == 1);
}

// Sums into shared memory that nobody has set to zero.
__global__ void uninitialised_shared_kernel(float* y) {
  float* const shared = dynamic_shared<float>();
  shared[threadIdx.x] += 1;
  __syncthreads();
  y[threadIdx.x] = shared[threadIdx.x];
}
int uninitialised_shared() {
  std::vector<float> y(32);
  launch(uninitialised_shared_kernel, 1, 32, 32 * sizeof(float), nullptr, y.data());
  return expect(y[0] == 1);
}

int too_much_shared() {
  std::vector<float> y(32);
  launch(uninitialised_shared_kernel, 1, 32, 48 * 1024 + 4, nullptr, y.data());
  return kNoticedNothing;
}

// Two reductions, one after the other, over 8 warps.
__global__ void reduce_kernel(double* sums, double* largest) {
  const double mine = threadIdx.x;
  sums[threadIdx.x] = osora::cuda::block_reduce(mine, osora::cuda::Sum());
  largest[threadIdx.x] = osora::cuda::block_reduce(mine, osora::cuda::Largest());
}
bool reduces() {
  std::vector<double> sums(256), largest(256);
  launch(reduce_kernel, 1, 256, osora::cuda::block_reduce_bytes(256), nullptr, sums.data(), largest.data());
  bool right = true;
  for (int t = 0; t < 256; ++t) right = right && sums[t] == 255 * 128 && largest[t] == 255;
  return right;
}

// Three rows, one adapter that adds nothing; small integers have exact sums.
bool decodes() {
  const int64_t n = 3, d = 5, k = 40, r = 24;
  const std::vector<float> x(n * k, 1.0f), v(k * r, 1.0f), w(d * k, 2.0f), u(d * r, 1.0f), s0(r, 1.0f), s(r), o(d);
  std::vector<float> h(n * r), y(n * d);
  osora::cuda::decode_shrink(x.data(), v.data(), h.data(), n, k, r, nullptr);
  const osora::cuda::DecodeAdapters<float> adapters{s0.data(), s.data(), o.data(), nullptr, nullptr, 1};
  osora::cuda::decode_expand(x.data(), w.data(), static_cast<const float*>(nullptr),
                             static_cast<const float*>(h.data()), u.data(), adapters, y.data(), n, d, k, r, nullptr);
  bool right = true;
  for (const float value : h) right = right && value == static_cast<float>(k);
  for (const float value : y) right = right && value == static_cast<float>(2 * k);
  return right;
}

int drop_barrier(int number) {
  dropped_barrier = number;
  bool right = reduces();
  right = decodes() && right;
  const int64_t d = 130, r = 257;  // several blocks, several tiles of columns
  const std::vector<float> u(d * r, 1.0f), s0(r, 1.0f), s(r), o(d);
  std::vector<float> p(d * r);  // every column another number; small integers have exact sums
  for (int64_t k = 0; k < d * r; ++k) p[k] = static_cast<float>(k % r);
  std::vector<float> ds(r), d_o(d), partial(osora::cuda::fold_backward_blocks(d) * r);
  osora::cuda::fold_backward(u.data(), p.data(), s0.data(), s.data(), o.data(), ds.data(), d_o.data(), partial.data(),
                             d, r, nullptr);
  for (int64_t j = 0; j < r; ++j) right = right && ds[j] == static_cast<float>(d * j);
  for (const float x : d_o) right = right && x == static_cast<float>(r * (r - 1) / 2);
  return expect(right);
}

std::vector<std::pair<std::string, std::function<int()>>> bugs() {
  std::vector<std::pair<std::string, std::function<int()>>> all = {
      {"read-past-end", read_past_end},
      {"misaligned-pack", misaligned_pack},
      {"barrier-for-some", [] { return run_simple(barrier_for_some_kernel, 32); }},
      {"two-barriers", [] { return run_simple(two_barriers_kernel, 32); }},
      {"barrier-after-exit", [] { return run_simple(barrier_after_exit_kernel, 64); }},
      {"mask-names-absent-lanes", [] { return run_simple(mask_names_absent_lanes_kernel, 32); }},
      {"source-outside-mask", [] { return run_simple(source_outside_mask_kernel, 32); }},
      {"own-lane-not-in-mask", [] { return run_simple(own_lane_not_in_mask_kernel, 32); }},
      {"masks-differ", [] { return run_simple(masks_differ_kernel, 32); }},
      {"blocks-race", blocks_race},
      {"missing-syncwarp", missing_syncwarp},
      {"shared-overrun", shared_overrun},
      {"uninitialised-shared", uninitialised_shared},
      {"too-much-shared", too_much_shared},
      {"no-bug", [] { return expect(right_without_svd_barrier(-1) && drop_barrier(-1) == kNoticedNothing); }},
  };
  for (int k = 0; k < kBarriers; ++k)
    all.emplace_back("drop-barrier-" + std::to_string(k), [k] { return drop_barrier(k); });
  for (int k = 0; k < svd_barriers(); ++k)
    all.emplace_back("drop-barrier-svd-" + std::to_string(k), [k] { return expect(right_without_svd_barrier(k)); });
  return all;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string wish = count == 2 ? arguments[1] : "";
  for (const auto& [name, run] : bugs()) {
    if (wish == "--list") std::printf("%s\n", name.c_str());
    if (wish != name) continue;
    try {
      return run();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s\n", error.what());
      return kRefused;
    }
  }
  return wish == "--list" ? 0 : 2;
}
