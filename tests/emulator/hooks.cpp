// The calls that the compiler puts before every load and store (-fsanitize=thread), and into
// failing branches of its checks of alignment and array bounds (-fsanitize=alignment,bounds,...).
// Their names and parameters are the compiler's; the sanitizers' own run-time libraries are not
// linked. This file itself is compiled without either flag.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <sstream>

#include "emulator/checker.h"
#include "emulator/report.h"

using pumice::emulator::AccessKind;

namespace {

inline bool in_stack(const void* address) {
  static const pumice::emulator::StackArena arena = pumice::emulator::stack_arena();
  return reinterpret_cast<uintptr_t>(address) - arena.begin < arena.bytes;
}

// Most accesses are to locals, of no interest.
#define PUMICE_CHECK_ACCESS(address, bytes, kind)                                     \
  do {                                                                                \
    if (!pumice::emulator::in_kernel || in_stack(address)) return;                    \
    const pumice::emulator::LeaveKernel leave;                                        \
    pumice::emulator::check_access(reinterpret_cast<uintptr_t>(address), bytes, kind, \
                                   __builtin_return_address(0));                      \
  } while (false)

}  // namespace

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

#define PUMICE_HOOK(name, bytes)                                                                 \
  void __tsan_read##name(void* p) { PUMICE_CHECK_ACCESS(p, bytes, AccessKind::kRead); }          \
  void __tsan_write##name(void* p) { PUMICE_CHECK_ACCESS(p, bytes, AccessKind::kWrite); }        \
  void __tsan_volatile_read##name(void* p) { PUMICE_CHECK_ACCESS(p, bytes, AccessKind::kRead); } \
  void __tsan_volatile_write##name(void* p) { PUMICE_CHECK_ACCESS(p, bytes, AccessKind::kWrite); }

PUMICE_HOOK(1, 1)
PUMICE_HOOK(2, 2)
PUMICE_HOOK(4, 4)
PUMICE_HOOK(8, 8)
PUMICE_HOOK(16, 16)

#define PUMICE_UNALIGNED_HOOK(bytes)                                                               \
  void __tsan_unaligned_read##bytes(void* p) { PUMICE_CHECK_ACCESS(p, bytes, AccessKind::kRead); } \
  void __tsan_unaligned_write##bytes(void* p) { PUMICE_CHECK_ACCESS(p, bytes, AccessKind::kWrite); }

PUMICE_UNALIGNED_HOOK(2)
PUMICE_UNALIGNED_HOOK(4)
PUMICE_UNALIGNED_HOOK(8)
PUMICE_UNALIGNED_HOOK(16)

void __tsan_read_range(void* p, size_t bytes) { PUMICE_CHECK_ACCESS(p, bytes, AccessKind::kRead); }
void __tsan_write_range(void* p, size_t bytes) {
  PUMICE_CHECK_ACCESS(p, bytes, AccessKind::kWrite);
}
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void*, void*) {}

// Calls to these are not instrumented, so the linker sends them here (--wrap).
void* __real_memcpy(void* to, const void* from, size_t bytes);
void* __real_memmove(void* to, const void* from, size_t bytes);
void* __real_memset(void* to, int value, size_t bytes);

static void check_range(const void* p, size_t bytes, AccessKind kind, const void* pc) {
  if (!pumice::emulator::in_kernel || bytes == 0 || in_stack(p)) return;
  const pumice::emulator::LeaveKernel leave;
  pumice::emulator::check_access(reinterpret_cast<uintptr_t>(p), bytes, kind, pc);
}

void* __wrap_memcpy(void* to, const void* from, size_t bytes) {
  check_range(from, bytes, AccessKind::kRead, __builtin_return_address(0));
  check_range(to, bytes, AccessKind::kWrite, __builtin_return_address(0));
  return __real_memcpy(to, from, bytes);
}
void* __wrap_memmove(void* to, const void* from, size_t bytes) {
  check_range(from, bytes, AccessKind::kRead, __builtin_return_address(0));
  check_range(to, bytes, AccessKind::kWrite, __builtin_return_address(0));
  return __real_memmove(to, from, bytes);
}
void* __wrap_memset(void* to, int value, size_t bytes) {
  check_range(to, bytes, AccessKind::kWrite, __builtin_return_address(0));
  return __real_memset(to, value, bytes);
}

// std::atomic and the guards of function-local statics: host code only, done as they say.
#define PUMICE_ATOMIC_HOOKS(bits, T)                                                               \
  T __tsan_atomic##bits##_load(const volatile T* a, int) {                                         \
    return __atomic_load_n(a, __ATOMIC_SEQ_CST);                                                   \
  }                                                                                                \
  void __tsan_atomic##bits##_store(volatile T* a, T v, int) {                                      \
    __atomic_store_n(a, v, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                \
  T __tsan_atomic##bits##_exchange(volatile T* a, T v, int) {                                      \
    return __atomic_exchange_n(a, v, __ATOMIC_SEQ_CST);                                            \
  }                                                                                                \
  T __tsan_atomic##bits##_fetch_add(volatile T* a, T v, int) {                                     \
    return __atomic_fetch_add(a, v, __ATOMIC_SEQ_CST);                                             \
  }                                                                                                \
  T __tsan_atomic##bits##_fetch_sub(volatile T* a, T v, int) {                                     \
    return __atomic_fetch_sub(a, v, __ATOMIC_SEQ_CST);                                             \
  }                                                                                                \
  T __tsan_atomic##bits##_fetch_and(volatile T* a, T v, int) {                                     \
    return __atomic_fetch_and(a, v, __ATOMIC_SEQ_CST);                                             \
  }                                                                                                \
  T __tsan_atomic##bits##_fetch_or(volatile T* a, T v, int) {                                      \
    return __atomic_fetch_or(a, v, __ATOMIC_SEQ_CST);                                              \
  }                                                                                                \
  T __tsan_atomic##bits##_fetch_xor(volatile T* a, T v, int) {                                     \
    return __atomic_fetch_xor(a, v, __ATOMIC_SEQ_CST);                                             \
  }                                                                                                \
  bool __tsan_atomic##bits##_compare_exchange_strong(volatile T* a, T* expected, T v, int, int) {  \
    return __atomic_compare_exchange_n(a, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }                                                                                                \
  bool __tsan_atomic##bits##_compare_exchange_weak(volatile T* a, T* expected, T v, int, int) {    \
    return __atomic_compare_exchange_n(a, expected, v, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);  \
  }

PUMICE_ATOMIC_HOOKS(8, uint8_t)
PUMICE_ATOMIC_HOOKS(16, uint16_t)
PUMICE_ATOMIC_HOOKS(32, uint32_t)
PUMICE_ATOMIC_HOOKS(64, uint64_t)
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}

}  // extern "C"

// What the compiler stores about a check: its place in the source, and types by name.
struct UbsanLocation {
  const char* file;
  uint32_t line, column;
};
struct UbsanType {
  uint16_t kind, info;
  char name[1];
};
struct UbsanMismatch {
  UbsanLocation location;
  const UbsanType* type;
  uint8_t log_alignment;
  uint8_t kind;
};
struct UbsanOutOfBounds {
  UbsanLocation location;
  const UbsanType* array;
  const UbsanType* index;
};

// `what` is a function, as the message must not be composed while accesses are checked.
template <class What>
static void fail_undefined(const UbsanLocation& location, What what) {
  using namespace pumice::emulator;
  if (!in_kernel) return;
  const LeaveKernel leave;
  std::ostringstream out;
  what(out);
  out << ", at " << shorten(location.file) << ':' << location.line << ": "
      << describe_thread(global_linear(current_thread()));
  fail(out.str(), {});
}

extern "C" {

void __ubsan_handle_type_mismatch_v1(UbsanMismatch* data, uintptr_t address) {
  fail_undefined(data->location, [=](std::ostream& out) {
    if (address == 0) {
      out << "null pointer: access to " << data->type->name;
    } else {
      out << "misaligned access: " << data->type->name
          << " at an address that is not a multiple of " << (1 << data->log_alignment);
    }
  });
}
void __ubsan_handle_out_of_bounds(UbsanOutOfBounds* data, uintptr_t index) {
  fail_undefined(data->location, [=](std::ostream& out) {
    out << "out of bounds of a local array: index " << static_cast<intptr_t>(index) << " of "
        << data->array->name;
  });
}
void __ubsan_handle_shift_out_of_bounds(UbsanLocation* data, uintptr_t, uintptr_t) {
  fail_undefined(*data, [](std::ostream& out) { out << "shift by more bits than the type has"; });
}
void __ubsan_handle_divrem_overflow(UbsanLocation* data, uintptr_t, uintptr_t) {
  fail_undefined(*data, [](std::ostream& out) { out << "division by zero"; });
}

}  // extern "C"
