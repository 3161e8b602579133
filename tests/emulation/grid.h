// SPDX-License-Identifier: Apache-2.0
// Runs a grid of emulated blocks, one after the other, each with one fiber per thread. The order of blocks and threads
// is chosen by OSORA_EMULATION_ORDER = forward | reverse | random:SEED; a right kernel gives the same bits in each.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "block.h"

namespace osora::emulation {

constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned kMaxThreads = 1024;         // of a block
constexpr size_t kMaxSharedBytes = 48 * 1024;  // without opting in to more
constexpr unsigned kMaxGridYZ = 65535;
constexpr int64_t kMaxGridX = (int64_t{1} << 31) - 1;

class Order {
 public:
  static Order from_environment() {
    const char* text = std::getenv("OSORA_EMULATION_ORDER");
    const std::string order = text ? text : "forward";
    if (order == "forward") return Order(kForward, 0);
    if (order == "reverse") return Order(kReverse, 0);
    if (order.rfind("random:", 0) == 0) return Order(kRandom, std::strtoull(order.c_str() + 7, nullptr, 10));
    throw std::invalid_argument("OSORA_EMULATION_ORDER must be forward, reverse or random:SEED, got " + order);
  }

  // 0 ... count - 1 as they shall run; a random order is another one at each call.
  OSORA_UNINSTRUMENTED void arrange(int64_t* sequence, int64_t count) {
    for (int64_t k = 0; k < count; ++k) sequence[k] = kind_ == kReverse ? count - 1 - k : k;
    for (int64_t k = count - 1; kind_ == kRandom && k > 0; --k) {
      state_ = state_ * 6364136223846793005u + 1442695040888963407u;  // Knuth's MMIX
      const int64_t other = static_cast<int64_t>((state_ >> 32) * static_cast<uint64_t>(k + 1) >> 32);
      const int64_t mine = sequence[k];
      sequence[k] = sequence[other], sequence[other] = mine;
    }
  }

  OSORA_UNINSTRUMENTED bool random() const { return kind_ == kRandom; }

 private:
  enum Kind { kForward, kReverse, kRandom };
  Order(Kind kind, uint64_t seed) : kind_(kind), state_(seed) {}
  Kind kind_;
  uint64_t state_;
};

// The fibers and stacks of one block's threads, used again for later blocks. A page below each stack faults on
// overflow.
class Crew {
 public:
  explicit Crew(unsigned threads) : threads_(threads), thread_(new Thread[threads]) {
    void* memory = mmap(nullptr, threads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("cuda emulation: no memory for stacks");
    stacks_ = static_cast<char*>(memory);
    for (unsigned t = 0; t < threads; ++t) {
      mprotect(stacks_ + t * kStackBytes, guard_, PROT_NONE);
      introduce_fiber(thread_[t].fiber);
    }
  }
  ~Crew() {
    for (unsigned t = 0; t < threads_; ++t) forget_fiber(thread_[t].fiber);
    munmap(stacks_, threads_ * kStackBytes);
  }
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;

  unsigned size() const { return threads_; }
  Thread* threads() { return thread_.get(); }
  OSORA_UNINSTRUMENTED void start(unsigned t, uint3 index, void (*entry)()) {
    Thread& thread = thread_[t];
    thread.linear = t;
    thread.index = index;
    thread.wait = Wait::kNone;
    start_fiber(thread.fiber, stacks_ + t * kStackBytes + guard_, kStackBytes - guard_, entry);
  }

 private:
  unsigned threads_;
  std::unique_ptr<Thread[]> thread_;
  char* stacks_;
  size_t guard_ = static_cast<size_t>(sysconf(_SC_PAGESIZE));
};

// To TSan, what a fiber did for the last block comes before what it does for the next; on a GPU it does not. So blocks
// take turns between two crews: neighbours in the schedule share no fiber and no stack, and their races show.
inline Crew& crew_for(unsigned threads, int64_t turn) {
  static thread_local std::unique_ptr<Crew> crews[OSORA_EMULATION_TSAN ? 2 : 1];
  auto& crew = crews[turn % std::size(crews)];
  if (!crew || crew->size() < threads) crew = std::make_unique<Crew>(threads);
  return *crew;
}

// Dynamic shared memory of one block: exact in size, so that ASan sees an overrun, and full of NaN (all bits set).
struct SharedMemory {
  explicit SharedMemory(size_t bytes) {
    if (bytes == 0) return;
    if (posix_memalign(&memory, 16, bytes) != 0) throw std::bad_alloc();
    std::memset(memory, 0xFF, bytes);
  }
  ~SharedMemory() { std::free(memory); }
  SharedMemory(SharedMemory&& other) noexcept : memory(std::exchange(other.memory, nullptr)) {}
  void* memory = nullptr;
};

inline std::atomic<int64_t> launches = 0;  // so far, by this library

// A kernel with its arguments.
struct Body {
  void (*call)(const void*);
  const void* context;
  char started = 0, finished = 0;  // tokens: the host before the launch, the launch before what the host does next
};
inline thread_local Body* current_body = nullptr;

OSORA_UNINSTRUMENTED inline void thread_entry() {
  fiber_entered(scheduler);
  acquire(&current_body->started);
  current_body->call(current_body->context);
  release(&current_body->finished);
  current_thread->wait = Wait::kExited;
  --current_block->running;
  switch_fiber(current_thread->fiber, scheduler, /*last=*/true);
  std::abort();
}

inline void check_launch(dim3 grid, dim3 block, size_t shared_bytes) {
  const auto refuse = [](const std::string& why) {
    throw std::runtime_error("osora: kernel launch: invalid configuration argument (" + why + ")");
  };
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) refuse("empty grid");
  if (grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ) refuse("grid too large");
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads) refuse(std::to_string(threads) + " threads in a block");
  if (shared_bytes > kMaxSharedBytes) refuse(std::to_string(shared_bytes) + " bytes of shared memory");
}

OSORA_UNINSTRUMENTED inline void run_block(Block& block, Crew& crew, Order& order, std::vector<int64_t>& sequence) {
  for (unsigned w = 0; w * kWarpSize < block.threads; ++w) block.warp[w] = Warp();
  for (unsigned t = 0; t < block.threads; ++t) {
    const dim3 shape = block.shape;
    crew.start(t, {t % shape.x, t / shape.x % shape.y, t / (shape.x * shape.y)}, &thread_entry);
  }
  for (bool first = true; block.running > 0; first = false) {
    bool any = false;
    if (first || order.random()) order.arrange(sequence.data(), block.threads);
    for (const int64_t t : sequence) {
      if (!runnable(block, block.thread[t])) continue;
      any = true;
      current_thread = &block.thread[t];
      switch_fiber(scheduler, current_thread->fiber);
    }
    current_thread = nullptr;
    if (!any) fail("deadlock: the rest of a barrier or of a mask never comes");
  }
}

OSORA_UNINSTRUMENTED inline void run_grid(dim3 grid, dim3 shape, size_t shared_bytes, Body& body) {
  check_launch(grid, shape, shared_bytes);
  ++launches;
  const unsigned count = shape.x * shape.y * shape.z;
  const auto warps = std::make_unique<Warp[]>((count + kWarpSize - 1) / kWarpSize);
  std::vector<int64_t> thread_sequence(count), block_sequence(int64_t{grid.x} * grid.y * grid.z);
  auto order = Order::from_environment();
  order.arrange(block_sequence.data(), static_cast<int64_t>(block_sequence.size()));
  std::vector<SharedMemory> kept;  // until the end of the launch: on the same address TSan would see blocks race
  current_body = &body;
  adopt_running_stack(scheduler);
  int64_t turn = 0;
  for (const int64_t b : block_sequence) {
    SharedMemory shared(shared_bytes);
    Crew& crew = crew_for(count, turn++);
    Block block;
    block.grid = grid;
    block.shape = shape;
    block.index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                   static_cast<unsigned>(b / (int64_t{grid.x} * grid.y))};
    block.threads = block.running = count;
    block.thread = crew.threads();
    block.warp = warps.get();
    block.shared = static_cast<unsigned char*>(shared.memory);
    current_block = &block;
    release(&body.started);  // the host's writes; blocks stay unordered among themselves, as on a GPU
    run_block(block, crew, order, thread_sequence);
    if (OSORA_EMULATION_TSAN) kept.push_back(std::move(shared));
  }
  acquire(&body.finished);
  current_block = nullptr;
  current_body = nullptr;
}

}  // namespace osora::emulation
