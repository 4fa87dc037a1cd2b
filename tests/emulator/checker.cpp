#include "emulator/checker.h"

#include <sys/mman.h>

#include <cstring>
#include <sstream>
#include <stdexcept>

#include "emulator/device_memory.h"

extern "C" {
// The first and the last byte of this library, from the linker.
extern const char __ehdr_start __attribute__((visibility("hidden")));
extern const char _end __attribute__((visibility("hidden")));
}

namespace pumice::emulator {
namespace {

constexpr size_t kSharedGuard = 512 * 1024;
constexpr size_t kSharedSpan = 2 * kSharedGuard + kSharedMemoryLimit;
constexpr uint64_t kSpinLimit = 10'000'000;

struct SharedArena {
  uintptr_t begin;
  Cell* cells;  // of the part between the guards
};

const SharedArena& shared_arena() {
  static const SharedArena arena = [] {
    const auto map = [](size_t bytes) {
      void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::runtime_error("emulator: no memory for shared memory");
      return memory;
    };
    return SharedArena{reinterpret_cast<uintptr_t>(map(kSharedSpan)),
                       static_cast<Cell*>(map(kSharedMemoryLimit * sizeof(Cell)))};
  }();
  return arena;
}

const char* verb(AccessKind kind) {
  switch (kind) {
    case AccessKind::kRead:
      return "reads";
    case AccessKind::kWrite:
      return "writes";
    case AccessKind::kAtomic:
      return "atomically updates";
    case AccessKind::kAsyncIssue:
      return "starts a cp.async into";
    case AccessKind::kAsyncLanding:
      return "lands a cp.async in";
  }
  return "";
}

// One access, and the words for it.
struct AccessInfo {
  AccessKind kind;
  uintptr_t address;
  size_t bytes;
  const void* pc;
  bool shared;
  const Window* window;  // of global memory

  std::string who_and_what() const {
    std::ostringstream out;
    out << describe_thread(global_linear(current_thread())) << ' ' << verb(kind) << ' ' << bytes
        << (bytes == 1 ? " byte" : " bytes");
    return out.str();
  }
  std::string where(uintptr_t at) const {
    std::ostringstream out;
    if (shared) {
      out << "shared memory offset " << static_cast<intptr_t>(at - shared_base());
    } else {
      out << "byte " << static_cast<intptr_t>(at - window->begin) << " of the " << window->name;
    }
    return out.str();
  }
  const char* space() const { return shared ? "shared memory" : "global memory"; }
};

[[noreturn]] void fail_access(const AccessInfo& access, uintptr_t at, const std::string& kind,
                              const std::string& detail, const void* other_pc = nullptr) {
  fail(kind + ": " + access.who_and_what() + " at " + access.where(at) + detail,
       other_pc ? std::vector<const void*>{access.pc, other_pc}
                : std::vector<const void*>{access.pc});
}

bool visible(uint32_t thread, Time time) {
  return time >= current_launch().block_start ? visible_in_block(thread, time)
                                              : released(thread, time);
}

// Whether every reader that the cell remembers is visible to, or is, the running thread.
bool readers_visible(const Cell& cell) {
  const Launch& launch = current_launch();
  const Thread& me = current_thread();
  if (cell.foreign_readers && !released(cell.read_thread, cell.read_time)) return false;
  if (cell.read_time < launch.block_start) return released(cell.read_thread, cell.read_time);
  if (cell.read_time < me.barrier_time) return true;
  if (cell.many_readers) return false;
  const uint32_t reader = cell.read_thread % launch.threads;
  const uint32_t me_bit = reader / 32 == me.linear / 32 ? 1u << me.linear % 32 : 0;
  const uint32_t others = cell.read_lanes & ~me_bit;
  if (others == 0) return true;
  if (me_bit == 0) return false;
  const Warp& warp = launch.warp[me.linear / 32];
  for (uint32_t lane = 0; lane < 32; ++lane) {
    if ((others >> lane & 1) && cell.read_time >= warp.seen[me.linear % 32][lane]) return false;
  }
  return true;
}

void remember_read(Cell& cell, Time oldest, const void* pc) {
  const Launch& launch = current_launch();
  const Thread& me = current_thread();
  const uint32_t linear = global_linear(me);
  if (cell.read_time < oldest || readers_visible(cell)) {
    cell.read_lanes = 0;
    cell.many_readers = cell.foreign_readers = 0;
  } else if (cell.read_time < launch.block_start) {
    cell.read_lanes = 0;
    cell.many_readers = 0;
    cell.foreign_readers = 1;
  } else if ((cell.read_thread % launch.threads) / 32 != me.linear / 32) {
    cell.many_readers = 1;
  }
  cell.read_time = now();
  cell.read_thread = linear;
  cell.read_lanes |= 1u << me.linear % 32;
  cell.read_pc = pc;
}

[[noreturn]] void fail_race(const AccessInfo& access, uintptr_t at, const char* other_did,
                            uint32_t other, const void* other_pc) {
  fail_access(access, at, std::string("data race on ") + access.space(),
              std::string(", which ") + describe_thread(other) + " " + other_did +
                  " with no synchronization in between",
              other_pc);
}

// The checks common to shared and global memory; what happened before `oldest` is forgotten.
void check_cell(Cell& cell, const AccessInfo& access, uintptr_t at, Time oldest) {
  const uint32_t me = global_linear(current_thread());
  const bool reads = access.kind == AccessKind::kRead;
  if (cell.write_time >= oldest && cell.write_thread != me &&
      !visible(cell.write_thread, cell.write_time) &&
      !(access.kind == AccessKind::kAtomic && (cell.flags & kAtomic))) {
    if (cell.flags & kAsync) {
      fail_access(access, at, "no barrier after the cp.async wait",
                  ", which a cp.async of " + describe_thread(cell.write_thread) +
                      " wrote: only that thread may use it before the next barrier",
                  cell.write_pc);
    }
    fail_race(access, at, (cell.flags & kAtomic) ? "atomically updated" : "wrote",
              cell.write_thread, cell.write_pc);
  }
  if (reads) {
    remember_read(cell, oldest, access.pc);
    return;
  }
  if (cell.read_time >= oldest && !readers_visible(cell)) {
    if (cell.read_thread == me) {
      fail_access(access, at, std::string("data race on ") + access.space(),
                  ", which other threads read too with no synchronization in between",
                  cell.read_pc);
    }
    fail_race(access, at, "read", cell.read_thread, cell.read_pc);
  }
  cell.write_time = now();
  cell.write_thread = me;
  cell.write_pc = access.pc;
  cell.read_time = 0;
  cell.read_lanes = cell.many_readers = cell.foreign_readers = 0;
  cell.flags = access.kind == AccessKind::kAtomic         ? kAtomic
               : access.kind == AccessKind::kAsyncIssue   ? kInFlight
               : access.kind == AccessKind::kAsyncLanding ? kAsync
                                                          : 0;
}

void check_shared(const AccessInfo& access) {
  const Launch& launch = current_launch();
  const uintptr_t base = shared_base();
  if (access.address < base || access.address + access.bytes > base + launch.shared_bytes) {
    fail_access(access, access.address, "out of bounds of shared memory",
                ", but the launch gave " + std::to_string(launch.shared_bytes) + " bytes of it");
  }
  Cell* cell = shared_arena().cells + (access.address - base);
  for (size_t i = 0; i < access.bytes; ++i) {
    const uintptr_t at = access.address + i;
    if (cell[i].write_time >= launch.block_start && (cell[i].flags & kInFlight) &&
        access.kind != AccessKind::kAsyncLanding) {
      fail_access(access, at, "cp.async still in flight",
                  ", the destination of a cp.async that " + describe_thread(cell[i].write_thread) +
                      " has not waited for",
                  cell[i].write_pc);
    }
    const bool reads = access.kind == AccessKind::kRead || access.kind == AccessKind::kAtomic;
    if (reads && cell[i].write_time < launch.block_start) {
      fail_access(access, at, "uninitialised shared memory",
                  ", which this block has not written: never, or not yet for want of a barrier");
    }
    check_cell(cell[i], access, at, launch.block_start);
  }
}

void check_global(AccessInfo access) {
  Launch& launch = current_launch();
  if (++launch.accesses_in_turn > kSpinLimit) {
    fail(
        "deadlock: " + describe_thread(global_linear(current_thread())) +
            " makes accesses for ever; blocks run one after another and cannot wait for each other",
        {access.pc});
  }
  Allocation* allocation = nearest_allocation(access.address);
  if (!allocation) {
    access.window = nullptr;
    fail(
        "out of bounds of global memory: " + access.who_and_what() + " of a device without tensors",
        {access.pc});
  }
  const bool reads = access.kind == AccessKind::kRead;
  const Window* inside = nullptr;
  for (const Window& window : allocation->windows) {
    const bool holds =
        window.begin <= access.address && access.address + access.bytes <= window.end;
    if (holds && (!inside || window.writable)) inside = &window;
    // The window nearest in the storage, for the message.
    if (!access.window || (access.address >= window.begin && window.begin > access.window->begin)) {
      access.window = &window;
    }
  }
  if (!inside) {
    fail_access(
        access, access.address, "out of bounds of global memory",
        ", which has " + std::to_string(access.window->end - access.window->begin) + " bytes");
  }
  access.window = inside;
  if (!reads && !inside->writable) {
    fail_access(access, access.address, "write to a read-only tensor", "");
  }
  if (!allocation->shadow) return;  // nothing of it can be written
  Cell* cell = allocation->shadow + (access.address - allocation->device);
  for (size_t i = 0; i < access.bytes; ++i) {
    check_cell(cell[i], access, access.address + i, launch.launch_start);
  }
}

[[noreturn]] void fail_address(const char* instruction, bool right_space, const char* space,
                               uintptr_t address, size_t alignment, const void* pc) {
  const LeaveKernel leave;
  std::ostringstream out;
  out << (right_space ? "misaligned access: " : "wrong address space: ")
      << describe_thread(global_linear(current_thread())) << " gives " << instruction;
  if (right_space) {
    out << ' ' << space << " address 0x" << std::hex << address << std::dec
        << ", which is not a multiple of " << alignment;
  } else {
    out << " an address that is not in " << space;
  }
  fail(out.str(), {pc});
}

}  // namespace

uintptr_t shared_base() { return shared_arena().begin + kSharedGuard; }

void begin_block_memory() {
  // All ones: NaN as a float, -1 as an integer, so that what slips through shows.
  std::memset(reinterpret_cast<void*>(shared_base()), 0xff, current_launch().shared_bytes);
}

bool visible_in_block(uint32_t thread, Time time) {
  const Launch& launch = current_launch();
  const Thread& me = current_thread();
  const uint32_t other = thread % launch.threads;
  if (other == me.linear || time < me.barrier_time) return true;
  if (other / 32 != me.linear / 32) return false;
  return time < launch.warp[me.linear / 32].seen[me.linear % 32][other % 32];
}

void check_access(uintptr_t address, size_t bytes, AccessKind kind, const void* pc) {
  AccessInfo access{kind, address, bytes, pc, false, nullptr};
  if (address - shared_arena().begin < kSharedSpan) {
    access.shared = true;
    check_shared(access);
  } else if (is_device_address(address)) {
    check_global(access);
  } else if (address < reinterpret_cast<uintptr_t>(&__ehdr_start) ||
             address >= reinterpret_cast<uintptr_t>(&_end)) {  // not a constant, not threadIdx
    std::ostringstream where;
    where << std::hex << address;
    fail("host memory: " + access.who_and_what() + " at address 0x" + where.str() +
             ", which is neither shared memory nor given by read_pointer or write_pointer",
         {pc});
  }
}

void check_shared_address(const char* instruction, const void* address, size_t alignment) {
  check_shared_address(instruction, address, alignment, __builtin_return_address(0));
}

void check_shared_address(const char* instruction, const void* address, size_t alignment,
                          const void* pc) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  const bool shared = at - shared_arena().begin < kSharedSpan;
  if (shared && at % alignment == 0) return;
  fail_address(instruction, shared, "shared memory", at - shared_base(), alignment, pc);
}

void check_global_address(const char* instruction, const void* address, size_t alignment,
                          const void* pc) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  const bool global = is_device_address(at);
  if (global && at % alignment == 0) return;
  fail_address(instruction, global, "global memory", at, alignment, pc);
}

void check_read(const void* address, size_t bytes) {
  const LeaveKernel leave;
  check_access(reinterpret_cast<uintptr_t>(address), bytes, AccessKind::kRead,
               __builtin_return_address(0));
}

void check_write(void* address, size_t bytes) {
  const LeaveKernel leave;
  check_access(reinterpret_cast<uintptr_t>(address), bytes, AccessKind::kWrite,
               __builtin_return_address(0));
}

void check_atomic(void* address, size_t bytes) {
  const LeaveKernel leave;
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  if (at % bytes) {
    fail_address("an atomic operation", true, "memory", at, bytes, __builtin_return_address(0));
  }
  check_access(at, bytes, AccessKind::kAtomic, __builtin_return_address(0));
  if (is_device_address(at)) on_global_atomic(at);
}

}  // namespace pumice::emulator
