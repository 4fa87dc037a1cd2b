// Cooperative threads with stacks of their own: one for each CUDA thread of a block.
#pragma once

#include <cstddef>
#include <cstdint>

// Elsewhere, and where the other way is to be tried here, the C library's contexts.
#if defined(__x86_64__) && !defined(PUMICE_EMULATOR_UCONTEXT)
#define PUMICE_EMULATOR_ASSEMBLY 1
#else
#include <ucontext.h>
#endif

namespace pumice::emulator {

// A suspended computation. The one that is running has no meaning stored here.
struct Fiber {
#ifdef PUMICE_EMULATOR_ASSEMBLY
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

// Makes `fiber` begin at entry() on stack number `index` when it is first switched to; entry must
// not return.
void prepare(Fiber& fiber, size_t index, void (*entry)());

// Goes on where `to` stopped, and returns once another switch goes to `from`.
void switch_fiber(Fiber& from, Fiber& to);

}  // namespace pumice::emulator
