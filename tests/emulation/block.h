// SPDX-License-Identifier: Apache-2.0
// One emulated block of threads: who waits where, and the barriers with the semantics of the CUDA C++ Programming
// Guide (synchronization functions, warp shuffle functions). A misuse ends the program with a report: on a GPU it is
// undefined behaviour or a hang.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <source_location>

#include "fiber.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace osora::emulation {

constexpr unsigned kWarpSize = 32;
using Site = std::source_location;  // a barrier in a kernel's source

enum class Wait : unsigned char { kNone, kBlock, kWarp, kExited };

struct Thread {
  Fiber fiber;
  uint3 index{};
  unsigned linear = 0;
  Wait wait = Wait::kNone;
  unsigned generation = 0;  // of the barrier it waits at
  unsigned mask = 0;        // of the warp operation it waits in
  Site site;
};

struct Warp {
  unsigned arrived = 0;  // lanes in a warp operation
  unsigned mask[kWarpSize] = {};
  unsigned generation[kWarpSize] = {};
  Site site[kWarpSize];
  uint64_t value[kWarpSize] = {};   // what a lane shows to the others
  unsigned source[kWarpSize] = {};  // the lane whose value it wants
  uint64_t shown[kWarpSize] = {};   // that value, and
  unsigned ballot[kWarpSize] = {};  // a bit per lane of the mask whose value is not zero: as all came together
  char token[2] = {};
};

struct Block {
  dim3 grid, shape;
  uint3 index{};
  unsigned threads = 0, running = 0;
  Thread* thread = nullptr;
  Warp* warp = nullptr;
  unsigned char* shared = nullptr;
  unsigned arrived = 0, generation = 0;  // of __syncthreads
  Site site;
  char token[2] = {};
};

inline thread_local Block* current_block = nullptr;
inline thread_local Thread* current_thread = nullptr;
inline thread_local Fiber scheduler;

// What a kernel asks about itself. Uninstrumented: the scheduler rewrites these for the next block.
OSORA_UNINSTRUMENTED inline uint3 thread_index() { return current_thread->index; }
OSORA_UNINSTRUMENTED inline uint3 block_index() { return current_block->index; }
OSORA_UNINSTRUMENTED inline dim3 block_shape() { return current_block->shape; }
OSORA_UNINSTRUMENTED inline dim3 grid_shape() { return current_block->grid; }
OSORA_UNINSTRUMENTED inline int lane_id() { return static_cast<int>(current_thread->linear % kWarpSize); }
OSORA_UNINSTRUMENTED inline unsigned char* shared_memory() { return current_block->shared; }

// Prints what went wrong and where the threads are, and aborts.
[[noreturn]] OSORA_UNINSTRUMENTED inline void fail(const char* what) {
  const Block& block = *current_block;
  std::fprintf(stderr, "cuda emulation: %s, in block (%u, %u, %u)\n", what, block.index.x, block.index.y,
               block.index.z);
  unsigned exited = 0, shown = 0;
  for (unsigned t = 0; t < block.threads; ++t) {
    const Thread& thread = block.thread[t];
    exited += thread.wait == Wait::kExited;
    const bool here = &thread == current_thread;
    if ((thread.wait != Wait::kBlock && thread.wait != Wait::kWarp && !here) || shown++ >= 8) continue;
    std::fprintf(stderr, "  thread %u %s %s:%u", t, here ? "is at" : "waits at", thread.site.file_name(),
                 thread.site.line());
    if (thread.wait == Wait::kWarp) std::fprintf(stderr, " for mask %08x", thread.mask);
    std::fprintf(stderr, "\n");
  }
  std::fprintf(stderr, "  %u of %u threads have exited\n", exited, block.threads);
  std::abort();
}

// Mostly one object of the compiler is behind both, and sanitizers make it slow to look into two.
OSORA_UNINSTRUMENTED inline bool same_place(const Site& a, const Site& b) {
  if constexpr (sizeof(Site) == sizeof(void*)) {
    if (__builtin_bit_cast(const void*, a) == __builtin_bit_cast(const void*, b)) return true;
  }
  return a.line() == b.line() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

// Back to the scheduler; it returns here once the barrier has opened.
OSORA_UNINSTRUMENTED inline void wait_for(Wait wait, unsigned generation) {
  Thread& me = *current_thread;
  me.wait = wait;
  me.generation = generation;
  switch_fiber(me.fiber, scheduler);
  me.wait = Wait::kNone;
}

// May the scheduler run this thread?
OSORA_UNINSTRUMENTED inline bool runnable(const Block& block, const Thread& thread) {
  switch (thread.wait) {
    case Wait::kNone:
      return true;
    case Wait::kBlock:
      return block.generation != thread.generation;
    case Wait::kWarp:
      return block.warp[thread.linear / kWarpSize].generation[thread.linear % kWarpSize] != thread.generation;
    case Wait::kExited:
      return false;
  }
  return false;
}

// __syncthreads: every thread of the block, at the same place of the program.
OSORA_UNINSTRUMENTED inline void block_barrier(const Site& site) {
  Block& block = *current_block;
  current_thread->site = site;
  if (block.running != block.threads) fail("__syncthreads after some threads of the block have exited");
  if (block.arrived == 0) block.site = site;
  if (!same_place(block.site, site)) fail("divergent __syncthreads: threads meet at different barriers");
  const unsigned generation = block.generation;
  char* const token = &block.token[generation & 1];
  release(token);
  if (++block.arrived == block.threads) {
    block.arrived = 0;
    ++block.generation;
  } else {
    wait_for(Wait::kBlock, generation);
  }
  acquire(token);
}

// Every lane of `mask`, naming the same mask at the same place. `orders_memory`: __syncwarp does, a shuffle does not.
OSORA_UNINSTRUMENTED inline void warp_barrier(unsigned mask, bool orders_memory, const Site& site) {
  Thread& me = *current_thread;
  Warp& warp = current_block->warp[me.linear / kWarpSize];
  const unsigned lane = me.linear % kWarpSize;
  me.site = site;
  me.mask = mask;
  if (!(mask >> lane & 1)) fail("a lane is not in the mask it named");
  const unsigned generation = warp.generation[lane];
  char* const token = &warp.token[generation & 1];
  if (orders_memory) release(token);
  warp.mask[lane] = mask;
  warp.site[lane] = site;
  warp.arrived |= 1u << lane;
  if ((warp.arrived & mask) == mask) {
    unsigned ballot = 0;
    for (unsigned other = 0; other < kWarpSize; ++other) {
      if (!(mask >> other & 1)) continue;
      if (warp.mask[other] != mask) fail("lanes of one warp operation named different masks");
      if (!same_place(warp.site[other], site)) fail("divergent warp operation: lanes meet at different places");
      ++warp.generation[other];
      if (warp.value[other]) ballot |= 1u << other;
    }
    for (unsigned other = 0; other < kWarpSize; ++other) {
      if (!(mask >> other & 1)) continue;
      warp.shown[other] = warp.value[warp.source[other]];
      warp.ballot[other] = ballot;
    }
    warp.arrived &= ~mask;
  } else {
    wait_for(Wait::kWarp, generation);
  }
  if (orders_memory) acquire(token);
}

// What lane `source` of the warp put in. The last to come reads for all: afterwards a lane may put in its next value.
OSORA_UNINSTRUMENTED inline uint64_t exchange(unsigned mask, uint64_t value, unsigned source, const Site& site) {
  const unsigned lane = current_thread->linear % kWarpSize;
  Warp& warp = current_block->warp[current_thread->linear / kWarpSize];
  warp.value[lane] = value;
  warp.source[lane] = source % kWarpSize;
  warp_barrier(mask, false, site);
  if (!(mask >> source & 1)) fail("a shuffle reads from a lane outside its mask");
  return warp.shown[lane];
}

// One bit per lane of the mask whose value is not zero.
OSORA_UNINSTRUMENTED inline unsigned ballot(unsigned mask, bool value, const Site& site) {
  const unsigned lane = current_thread->linear % kWarpSize;
  Warp& warp = current_block->warp[current_thread->linear / kWarpSize];
  warp.value[lane] = value;
  warp_barrier(mask, false, site);
  return warp.ballot[lane];
}

}  // namespace osora::emulation
