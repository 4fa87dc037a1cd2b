// The state of the launch under way. Blocks run one after another, the threads of a block in turns.
#pragma once

#include <vector_types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "emulator/fiber.h"
#include "emulator/runtime.h"

namespace pumice::emulator {

// Time is the number of synchronizations so far, over all launches. An access is known by the
// thread that made it and its time; what a thread may rely on is then a comparison of two times.
using Time = uint32_t;

struct AsyncCopy {
  uint32_t offset;  // in shared memory
  uint32_t bytes;
  uint32_t group;
  uint8_t data[16];
  const void* pc;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  uint32_t linear;  // in the block
  bool done;
  const char* waiting_at;  // the collective, or null
  uint32_t waiting_mask;
  const void* waiting_pc;
  bool predicate;
  Time barrier_time;        // whatever the block did before it is visible to this thread
  Time fence_time;          // of its last __threadfence
  Time fence_barrier_time;  // barrier_time then
  uint32_t copy_group;      // cp.async groups committed so far
  std::vector<AsyncCopy> copies;
};

struct Rendezvous {
  const char* name;
  WarpRule rule;
  uint32_t mask;
  uint32_t arrived;
  void* arguments[32];
  Combine combine;
};

struct Warp {
  // Whatever lane j did before seen[i][j] is visible to lane i (by __syncwarp).
  Time seen[32][32];
  uint32_t exited;
  std::vector<Rendezvous> open;
};

struct Launch {
  dim3 grid, block;
  uint32_t threads = 0;  // in a block
  size_t shared_bytes = 0;
  void (*invoke)(void*) = nullptr;
  void* closure = nullptr;

  Time launch_start = 0, block_start = 0;
  uint3 block_index = {};
  uint32_t block_linear = 0;

  std::vector<Thread> thread;
  std::vector<Warp> warp;
  std::vector<uint32_t> ready;
  uint32_t at_barrier = 0;
  int barrier_count = 0;
  uint32_t running = 0;
  Fiber host;
  uint64_t random_state = 0;
  uint64_t accesses_in_turn = 0;  // to tell a thread that spins for ever

  std::string error;
  std::vector<const void*> error_pcs;
};

// The launch under way, or the last one.
extern Launch launch_under_way;
inline Launch& current_launch() { return launch_under_way; }
inline Thread& current_thread() {
  Launch& launch = current_launch();
  return launch.thread[launch.running];
}

extern Time clock_time;
inline Time now() { return clock_time; }
inline Time tick() { return ++clock_time; }

// Set while device code runs on this OS thread; the compiler's hooks do nothing otherwise. The
// emulator clears it while it works on a kernel's behalf.
extern thread_local bool in_kernel __attribute__((tls_model("initial-exec")));

class LeaveKernel {
 public:
  LeaveKernel() : before_(in_kernel) { in_kernel = false; }
  ~LeaveKernel() { in_kernel = before_; }
  LeaveKernel(const LeaveKernel&) = delete;
  LeaveKernel& operator=(const LeaveKernel&) = delete;

 private:
  bool before_;
};

// Ends the launch: the running fiber is abandoned and the launcher throws `message`, followed by
// the source lines of `pcs`.
[[noreturn]] void fail(std::string message, std::vector<const void*> pcs);

// Gives up the running thread's turn until another, or it itself, has called make_ready for it.
void wait_at(const char* what, uint32_t mask, const void* pc);
void make_ready(uint32_t linear);

// The thread has left the kernel: rendezvous that need not wait for it any more go on.
void leave_warp(Thread& thread);

// "thread (3,0,0) of block (1,0,0)"; `global_linear` counts threads over the grid.
std::string describe_thread(uint32_t global_linear);
inline uint32_t global_linear(const Thread& thread) {
  return launch_under_way.block_linear * launch_under_way.threads + thread.linear;
}

// Block (x,y,z) number `linear` of the grid.
uint3 block_index_of(uint32_t linear);

}  // namespace pumice::emulator
