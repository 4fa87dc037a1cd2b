// Synchronization between blocks: "write, __threadfence, atomic" here and "atomic, __threadfence,
// read" there make the writes visible, and nothing else does.
//
// A fence alone orders nothing with another block; an atomic operation after it publishes what the
// fence had behind it, and one that follows on the same address may pick that up, to be used after
// a fence of the second block.
#include <unordered_map>
#include <vector>

#include "emulator/checker.h"

namespace pumice::emulator {
namespace {

struct Release {
  uint32_t thread;  // counted over the grid
  Time before;      // what it did before this time is published
};

std::unordered_map<uintptr_t, std::vector<Release>> published;  // by the atomic's address
std::vector<Release> picked_up;                                 // by this block, not fenced yet
std::vector<Release> acquired;                                  // by this block
bool fenced = false;                                            // this block, at all

}  // namespace

void begin_launch_releases() { published.clear(); }

void begin_block_releases() {
  picked_up.clear();
  acquired.clear();
  fenced = false;
}

void on_global_atomic(uintptr_t address) {
  const Launch& launch = current_launch();
  const Thread& me = current_thread();
  const auto found = published.find(address);
  if (found != published.end()) {
    picked_up.insert(picked_up.end(), found->second.begin(), found->second.end());
  }
  // Most atomic operations publish nothing: outside of hand-shakes nobody fences.
  if (!fenced) return;
  std::vector<Release>& releases = published[address];
  releases.insert(releases.end(), acquired.begin(), acquired.end());
  for (const Thread& thread : launch.thread) {
    // Behind this thread's own fence: all that a barrier showed it. Behind another's: what that one
    // did itself, if a barrier has shown this thread the fence.
    Time before = thread.linear == me.linear ? me.fence_time : me.fence_barrier_time;
    const bool fence_seen = thread.linear != me.linear && thread.fence_time != 0 &&
                            visible_in_block(global_linear(thread), thread.fence_time - 1);
    if (fence_seen && thread.fence_time > before) before = thread.fence_time;
    if (before > launch.block_start) releases.push_back({global_linear(thread), before});
  }
}

void on_fence() {
  Thread& me = current_thread();
  fenced = true;
  me.fence_time = tick();
  me.fence_barrier_time = me.barrier_time;
  acquired.insert(acquired.end(), picked_up.begin(), picked_up.end());
  picked_up.clear();
}

bool released(uint32_t writer, Time time) {
  for (const Release& release : acquired) {
    if (release.thread == writer && time < release.before) return true;
  }
  return false;
}

}  // namespace pumice::emulator
