// SPDX-License-Identifier: Apache-2.0
// Independent tasks on as many threads as torch may use, each with a single-threaded BLAS inside.
#pragma once
#include <ATen/Parallel.h>

#include <atomic>
#include <exception>
#include <functional>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

// Both libraries come with torch where they exist; where they don't, the symbol is null and the setting not needed.
extern "C" {
__attribute__((weak)) void omp_set_num_threads(int);
__attribute__((weak)) int MKL_Set_Num_Threads_Local(int);
}

namespace osora {

// torch sets a new thread's number, also MKL's, at its first use, and would undo a setting made before that. Once in
// torch, once in this library, which has its own copy of the inline function that at::parallel_for asks.
inline void let_torch_set_its_number() {
  at::get_num_threads();
  at::internal::lazy_init_num_threads();
}

// While it lives, BLAS called from this thread uses this thread alone. Inside at::parallel_for MKL would choose for
// itself, from what the thread did before: other bits from one call to the next.
struct SingleThreadedBlas {
  SingleThreadedBlas() {
    let_torch_set_its_number();
    if (MKL_Set_Num_Threads_Local) before_ = MKL_Set_Num_Threads_Local(1);
  }
  ~SingleThreadedBlas() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before_);
  }
  SingleThreadedBlas(const SingleThreadedBlas&) = delete;
  SingleThreadedBlas& operator=(const SingleThreadedBlas&) = delete;

 private:
  int before_ = 0;
};

// Runs task(i) for i in [0, count) on at most `workers` threads. Every task sees one thread, also when it is alone:
// what it computes cannot depend on how many tasks there are. The first exception is rethrown here, after all threads
// have ended.
inline void run_single_threaded(int64_t count, int64_t workers, const std::function<void(int64_t)>& task) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  const auto work = [&] {
    let_torch_set_its_number();
    if (omp_set_num_threads) omp_set_num_threads(1);
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(1);
    for (int64_t i = next++; i < count && !failed; i = next++) {
      try {
        task(i);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  };
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < std::min(count, workers); ++t) {
    try {
      threads.emplace_back(work);
    } catch (const std::system_error&) {  // no more threads to be had
      break;
    }
  }
  if (threads.empty() && count > 0) throw std::runtime_error("osora: no thread could be started");
  for (auto& thread : threads) thread.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace osora
