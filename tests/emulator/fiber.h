// SPDX-License-Identifier: Apache-2.0
// Fibers: a stack each, switched by hand. ucontext does it everywhere, with two system calls a switch; on x86-64 a few
// instructions do. Sanitizers know ucontext, so they get it.
#pragma once

#include <cstdint>
#include <memory>

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define RF_FAST_FIBERS
#else
#include <sys/mman.h>
#include <ucontext.h>
#endif

#include "races.h"

namespace emulator {

constexpr size_t kStack = 128 * 1024;

#ifdef RF_FAST_FIBERS

struct Fiber {
  std::unique_ptr<char[]> stack;
  void* top = nullptr;  // the saved stack pointer
};

// Saves the registers that a call must keep, leaves this stack for the other, and takes its registers back.
extern "C" void rf_switch_stack(void** save, void* to);
asm(R"(
.text
.weak rf_switch_stack
.type rf_switch_stack, @function
rf_switch_stack:
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
.size rf_switch_stack, .-rf_switch_stack
)");

inline void switch_fiber(Fiber& from, Fiber& to) { rf_switch_stack(&from.top, to.top); }

inline void start_fiber(Fiber& fiber, void (*entry)()) {
  if (!fiber.stack) fiber.stack.reset(new char[kStack]);
  uintptr_t end = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStack) / 16 * 16;
  void** top = reinterpret_cast<void**>(end);
  *--top = nullptr;                         // the caller that entry never returns to
  *--top = reinterpret_cast<void*>(entry);  // where the first switch returns to
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.top = top;
}

#else

struct Fiber {
  void* stack = nullptr;
  ucontext_t context;
};

inline void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

inline void start_fiber(Fiber& fiber, void (*entry)()) {
  if (fiber.stack != nullptr && kWatchesRaces) {  // two threads on one stack would seem to race
    munmap(fiber.stack, kStack);
    fiber.stack = nullptr;
  }
  if (fiber.stack == nullptr) {
    fiber.stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  }
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

#endif

}  // namespace emulator
