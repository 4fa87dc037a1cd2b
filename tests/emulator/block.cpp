#include "emulator/block.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <sstream>
#include <stdexcept>

#include "emulator/checker.h"
#include "emulator/device_memory.h"
#include "emulator/launch.h"
#include "emulator/report.h"

// As device code sees them; set whenever a thread gets its turn.
uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace pumice::emulator {

Launch launch_under_way;
Time clock_time = 1;
thread_local bool in_kernel = false;

namespace {

// splitmix64: good enough a shuffle, and one word of state.
uint64_t next_random(uint64_t& state) {
  uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

uint64_t seed() {
  const char* text = std::getenv("PUMICE_EMULATOR_SEED");
  return text ? std::strtoull(text, nullptr, 10) : 0;
}

void check_geometry(const Launch& launch, const void* kernel) {
  const dim3 grid = launch.grid, block = launch.block;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const bool grid_ok = grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x <= 0x7fffffff &&
                       grid.y <= 65535 && grid.z <= 65535;
  if (grid_ok && threads >= 1 && threads <= kMaxFibers && block.z <= 64 &&
      launch.shared_bytes <= kSharedMemoryLimit) {
    return;
  }
  std::ostringstream out;
  out << "emulator: invalid launch of " << function_name(kernel) << ": grid " << grid.x << 'x'
      << grid.y << 'x' << grid.z << ", block " << block.x << 'x' << block.y << 'x' << block.z
      << ", " << launch.shared_bytes << " bytes of shared memory";
  throw std::runtime_error(out.str());
}

// Gives up this thread's turn.
void yield() {
  Launch& launch = current_launch();
  switch_fiber(launch.thread[launch.running].fiber, launch.host);
}

void thread_main() {
  Launch& launch = current_launch();
  in_kernel = true;
  launch.invoke(launch.closure);
  in_kernel = false;
  Thread& me = current_thread();
  me.done = true;
  leave_warp(me);
  yield();
  std::abort();  // a finished thread is never resumed
}

void start_block(Launch& launch, uint32_t linear) {
  launch.block_linear = linear;
  launch.block_index = block_index_of(linear);
  launch.block_start = tick();
  launch.at_barrier = 0;
  launch.barrier_count = 0;
  launch.ready.resize(launch.threads);
  std::iota(launch.ready.begin(), launch.ready.end(), 0u);
  for (uint32_t i = 0; i < launch.threads; ++i) {
    Thread& thread = launch.thread[i];
    const dim3 block = launch.block;
    thread.index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    thread.linear = i;
    thread.done = false;
    thread.waiting_at = nullptr;
    thread.barrier_time = launch.block_start;
    thread.fence_time = thread.fence_barrier_time = 0;
    thread.copy_group = 0;
    thread.copies.clear();
    prepare(thread.fiber, i, thread_main);
  }
  for (uint32_t w = 0; w < launch.warp.size(); ++w) {
    Warp& warp = launch.warp[w];
    std::fill_n(&warp.seen[0][0], 32 * 32, launch.block_start);
    const uint32_t lanes = std::min(32u, launch.threads - 32 * w);
    warp.exited = lanes == 32 ? 0 : ~0u << lanes;  // lanes that do not exist
    warp.open.clear();
  }
  begin_block_memory();
  begin_block_releases();
}

void run_block(Launch& launch, uint32_t linear) {
  start_block(launch, linear);
  uint32_t done = 0;
  while (!launch.ready.empty()) {
    std::swap(launch.ready[next_random(launch.random_state) % launch.ready.size()],
              launch.ready.back());
    launch.running = launch.ready.back();
    launch.ready.pop_back();
    Thread& thread = launch.thread[launch.running];
    threadIdx = thread.index;
    blockIdx = launch.block_index;
    launch.accesses_in_turn = 0;
    switch_fiber(launch.host, thread.fiber);
    if (!launch.error.empty()) return;
    done += thread.done;
  }
  if (done < launch.threads) launch.error = describe_deadlock();
}

}  // namespace

uint3 block_index_of(uint32_t linear) {
  const dim3 grid = current_launch().grid;
  return {linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y};
}

void fail(std::string message, std::vector<const void*> pcs) {
  Launch& launch = current_launch();
  in_kernel = false;
  launch.error = std::move(message);
  launch.error_pcs = std::move(pcs);
  yield();
  std::abort();
}

void wait_at(const char* what, uint32_t mask, const void* pc) {
  Thread& me = current_thread();
  me.waiting_at = what;
  me.waiting_mask = mask;
  me.waiting_pc = pc;
  yield();
  me.waiting_at = nullptr;
}

void make_ready(uint32_t linear) { current_launch().ready.push_back(linear); }

int block_threads() { return static_cast<int>(current_launch().threads); }
int lane_id() { return static_cast<int>(current_thread().linear % 32); }
void* shared_memory() { return reinterpret_cast<void*>(shared_base()); }

int block_barrier(bool predicate) {
  const LeaveKernel leave;
  Launch& launch = current_launch();
  current_thread().predicate = predicate;
  if (++launch.at_barrier == launch.threads) {
    launch.at_barrier = 0;
    launch.barrier_count = 0;
    const Time time = tick();
    for (Thread& thread : launch.thread) {
      thread.barrier_time = time;
      launch.barrier_count += thread.predicate;
      make_ready(thread.linear);
    }
  }
  wait_at("__syncthreads()", 0, __builtin_return_address(0));
  return launch.barrier_count;
}

void thread_fence() {
  const LeaveKernel leave;
  on_fence();
}

void kernel_error(const char* kind, const char* detail) {
  const LeaveKernel leave;
  fail(std::string(kind) + ": " + describe_thread(global_linear(current_thread())) + " " + detail,
       {__builtin_return_address(0)});
}

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*invoke)(void*), void* closure,
              const void* kernel) {
  if (!scope_is_open()) {
    throw std::runtime_error("emulator: a launcher launched before it opened a DeviceGuard");
  }
  Launch& launch = current_launch();
  launch.grid = grid;
  launch.block = block;
  launch.shared_bytes = shared_bytes;
  check_geometry(launch, kernel);
  launch.threads = block.x * block.y * block.z;
  launch.invoke = invoke;
  launch.closure = closure;
  launch.thread.resize(launch.threads);
  launch.warp.resize((launch.threads + 31) / 32);
  launch.random_state = seed();
  launch.error.clear();
  launch.error_pcs.clear();
  launch.launch_start = tick();
  blockDim = block;
  gridDim = grid;
  copy_to_device();
  begin_launch_releases();
  std::vector<uint32_t> order(size_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0u);
  for (size_t i = order.size(); i > 1; --i) {
    std::swap(order[i - 1], order[next_random(launch.random_state) % i]);
  }
  for (const uint32_t linear : order) {
    run_block(launch, linear);
    if (!launch.error.empty()) throw std::runtime_error(report(kernel));
  }
  copy_to_host();
}

}  // namespace pumice::emulator
