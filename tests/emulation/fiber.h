// SPDX-License-Identifier: Apache-2.0
// A fiber: a call stack that runs until it hands control to another one. The sanitizers are told of each switch.
#pragma once
#include <cstddef>
#include <cstdlib>

#if !defined(__x86_64__) || defined(OSORA_EMULATION_UCONTEXT)
#include <ucontext.h>
#define OSORA_EMULATION_ASM 0
#else
#define OSORA_EMULATION_ASM 1
#endif

#if defined(__has_feature)
#define OSORA_HAS_FEATURE(x) __has_feature(x)
#else
#define OSORA_HAS_FEATURE(x) 0
#endif

#if defined(__SANITIZE_THREAD__) || OSORA_HAS_FEATURE(thread_sanitizer)
#include <sanitizer/tsan_interface.h>
#define OSORA_EMULATION_TSAN 1
// The scheduler is one OS thread whose own bookkeeping is no race: TSan must see the kernels' accesses only.
#define OSORA_UNINSTRUMENTED __attribute__((no_sanitize_thread, noinline))
#else
#define OSORA_EMULATION_TSAN 0
#define OSORA_UNINSTRUMENTED __attribute__((noinline))
#endif

#if defined(__SANITIZE_ADDRESS__) || OSORA_HAS_FEATURE(address_sanitizer)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define OSORA_EMULATION_ASAN 1
#else
#define OSORA_EMULATION_ASAN 0
#endif

namespace osora::emulation {

struct Fiber {
#if OSORA_EMULATION_ASM
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  const void* stack = nullptr;  // lowest address
  size_t stack_bytes = 0;
  void* tsan = nullptr;
};

#if OSORA_EMULATION_ASM
// Saves the registers that a call must keep on the running stack, and takes them from the other.
extern "C" void osora_emulation_switch(void** save_stack_pointer, void* load_stack_pointer);
__asm__(R"(
.text
.weak osora_emulation_switch
.type osora_emulation_switch,@function
osora_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size osora_emulation_switch,.-osora_emulation_switch
)");
#endif

// `entry` will run on `stack` at the first switch to the fiber. It must begin with fiber_entered() and never return.
OSORA_UNINSTRUMENTED inline void start_fiber(Fiber& fiber, char* stack, size_t bytes, void (*entry)()) {
  fiber.stack = stack;
  fiber.stack_bytes = bytes;
#if OSORA_EMULATION_ASAN
  __asan_unpoison_memory_region(stack, bytes);  // frames of the fiber that had this stack before
#endif
#if OSORA_EMULATION_ASM
  constexpr int kSavedRegisters = 6;
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // where a call would leave its return address: keeps the stack aligned as the ABI wants it
  *--top = reinterpret_cast<void*>(entry);
  for (int k = 0; k < kSavedRegisters; ++k) *--top = nullptr;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

// TSan's identity of a fiber. Making one takes it a millisecond, so it is made apart from start_fiber and used again.
OSORA_UNINSTRUMENTED inline void introduce_fiber([[maybe_unused]] Fiber& fiber) {
#if OSORA_EMULATION_TSAN
  fiber.tsan = __tsan_create_fiber(0);
#endif
}
OSORA_UNINSTRUMENTED inline void forget_fiber([[maybe_unused]] Fiber& fiber) {
#if OSORA_EMULATION_TSAN
  __tsan_destroy_fiber(fiber.tsan);
#endif
}

// Makes `fiber` stand for the stack that is running now, the one made by the operating system.
OSORA_UNINSTRUMENTED inline void adopt_running_stack([[maybe_unused]] Fiber& fiber) {
#if OSORA_EMULATION_TSAN
  fiber.tsan = __tsan_get_current_fiber();
#endif
}

// Leaves `from` for `to`; returns when someone switches back. `last`: `from` will not run again.
OSORA_UNINSTRUMENTED inline void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool last = false) {
#if OSORA_EMULATION_TSAN
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);  // a switch orders nothing: only barriers do
#endif
#if OSORA_EMULATION_ASAN
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack, to.stack, to.stack_bytes);
#endif
#if OSORA_EMULATION_ASM
  osora_emulation_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if OSORA_EMULATION_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// First call of a fiber's entry; `from` is the fiber that switched to it (ASan learns here where its stack lies).
OSORA_UNINSTRUMENTED inline void fiber_entered([[maybe_unused]] Fiber& from) {
#if OSORA_EMULATION_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &from.stack, &from.stack_bytes);
#endif
}

// Happens-before edges for TSan: everything before release(token) is seen after a later acquire(token).
OSORA_UNINSTRUMENTED inline void release([[maybe_unused]] char* token) {
#if OSORA_EMULATION_TSAN
  __tsan_release(token);
#endif
}
OSORA_UNINSTRUMENTED inline void acquire([[maybe_unused]] char* token) {
#if OSORA_EMULATION_TSAN
  __tsan_acquire(token);
#endif
}

}  // namespace osora::emulation
