// The dynamic checker: what every load and store of a kernel passes through.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emulator/block.h"

namespace pumice::emulator {

// What is remembered of one byte: its last write, and the reads since that the next write has to
// come after. Zero-filled cells are valid: time 0 is before any launch.
struct Cell {
  Time write_time;
  uint32_t write_thread;  // counted over the grid
  Time read_time;         // of the latest read
  uint32_t read_thread;
  uint32_t read_lanes;      // the readers, as lanes of read_thread's warp ...
  uint8_t many_readers;     // ... and others of the block,
  uint8_t foreign_readers;  // ... and of other blocks
  uint8_t flags;
  const void* write_pc;
  const void* read_pc;
};

enum CellFlags : uint8_t {
  kInFlight = 1,  // the destination of a cp.async that was not waited for
  kAsync = 2,     // last written by one that was
  kAtomic = 4,    // last written by an atomic operation
};

enum class AccessKind { kRead, kWrite, kAtomic, kAsyncIssue, kAsyncLanding };

void check_access(uintptr_t address, size_t bytes, AccessKind kind, const void* pc);

// Fails unless the address is in that memory and a multiple of `alignment`.
void check_shared_address(const char* instruction, const void* address, size_t alignment,
                          const void* pc);
void check_global_address(const char* instruction, const void* address, size_t alignment,
                          const void* pc);

// The shared memory of the running block, in the middle of a larger piece that catches what misses
// it.
uintptr_t shared_base();
void begin_block_memory();

// Release and acquire between blocks, by __threadfence and atomic operations on global memory
// (release.cpp).
void begin_launch_releases();
void begin_block_releases();
void on_global_atomic(uintptr_t address);
void on_fence();
// Whether what thread `writer` of another block did at `time` is visible to the running one.
bool released(uint32_t writer, Time time);

// Whether what `thread` (counted over the grid) of the running block did at `time` is visible to
// the running thread.
bool visible_in_block(uint32_t thread, Time time);

}  // namespace pumice::emulator
