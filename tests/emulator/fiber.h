// Cooperative threads with stacks of their own: one for each CUDA thread of a block.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace pumice::emulator {

// A suspended computation. The one that is running has no meaning stored here.
struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

// Deep enough for a kernel's unrolled register arrays in an unoptimized build; only touched pages
// cost memory. Below each stack lies a page that may not be touched.
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kMaxFibers = 1024;

// All stacks lie in one piece of address space, so that the checker knows them by one comparison.
struct StackArena {
  uintptr_t begin;
  size_t bytes;
};
const StackArena& stack_arena();

// Makes `fiber` begin at entry() on stack number `index` when it is first resumed; entry must not
// return.
void prepare(Fiber& fiber, size_t index, void (*entry)());

// Stops here, which resume(other, from) continues, and goes on where `to` stopped.
void switch_fiber(Fiber& from, Fiber& to);

}  // namespace pumice::emulator
