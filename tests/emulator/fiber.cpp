#include "emulator/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

namespace pumice::emulator {
namespace {

StackArena map_stacks() {
  const size_t stride = kStackBytes + static_cast<size_t>(getpagesize());
  const size_t bytes = kMaxFibers * stride;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  for (size_t i = 0; i < kMaxFibers; ++i) {
    mprotect(static_cast<char*>(memory) + i * stride, stride - kStackBytes, PROT_NONE);
  }
  return {reinterpret_cast<uintptr_t>(memory), bytes};
}

uintptr_t stack_top(size_t index) {
  const StackArena& arena = stack_arena();
  return arena.begin + (index + 1) * (arena.bytes / kMaxFibers);
}

}  // namespace

const StackArena& stack_arena() {
  static const StackArena arena = map_stacks();
  return arena;
}

#ifdef PUMICE_EMULATOR_ASSEMBLY

// swapcontext() saves the signal mask by a system call, which would be most of the emulator's time.
// A call needs to keep only the registers that the System V ABI makes the callee's.
extern "C" void pumice_emulator_switch(void** save, void* load);
asm(R"(
  .text
  .globl pumice_emulator_switch
  .hidden pumice_emulator_switch
  .type pumice_emulator_switch, @function
pumice_emulator_switch:
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
  .size pumice_emulator_switch, .-pumice_emulator_switch
)");

void prepare(Fiber& fiber, size_t index, void (*entry)()) {
  // What the switch pops: six registers and the address it returns to. One word stays above, as a
  // function expects its own return address there and the stack 16-byte aligned below it.
  auto* stack = reinterpret_cast<uintptr_t*>(stack_top(index)) - 1;
  *stack = 0;
  *--stack = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < 6; ++i) *--stack = 0;
  fiber.stack_pointer = stack;
}

void switch_fiber(Fiber& from, Fiber& to) {
  pumice_emulator_switch(&from.stack_pointer, to.stack_pointer);
}

#else

void prepare(Fiber& fiber, size_t index, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = reinterpret_cast<void*>(stack_top(index) - kStackBytes);
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#endif

}  // namespace pumice::emulator
