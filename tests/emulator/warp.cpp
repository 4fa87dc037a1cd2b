// Rendezvous of the lanes of a warp.
#include <algorithm>
#include <string>

#include "emulator/block.h"
#include "emulator/report.h"

namespace pumice::emulator {
namespace {

constexpr const char* kWarpBarrier = "__syncwarp()";

bool complete(const Rendezvous& meeting, const Warp& warp) {
  const uint32_t excused = meeting.rule == WarpRule::kNamedLanes ? warp.exited : 0;
  return ((meeting.arrived | excused) & meeting.mask) == meeting.mask;
}

// Each of the lanes sees what any of them had seen, and what they did themselves until now.
void order_memory(Warp& warp, uint32_t lanes) {
  Time joined[32] = {};
  const Time time = tick();
  for (int i = 0; i < 32; ++i) {
    if (!(lanes >> i & 1)) continue;
    for (int j = 0; j < 32; ++j) joined[j] = std::max(joined[j], warp.seen[i][j]);
  }
  for (int i = 0; i < 32; ++i) {
    if (lanes >> i & 1) joined[i] = time;
  }
  for (int i = 0; i < 32; ++i) {
    if (lanes >> i & 1) std::copy_n(joined, 32, warp.seen[i]);
  }
}

void finish(Warp& warp, uint32_t first_thread, size_t index) {
  const Rendezvous meeting = warp.open[index];
  warp.open.erase(warp.open.begin() + static_cast<std::ptrdiff_t>(index));
  if (meeting.combine) {
    meeting.combine(meeting.arguments, meeting.arrived);
  } else {
    order_memory(warp, meeting.arrived);
  }
  for (uint32_t lane = 0; lane < 32; ++lane) {
    if (meeting.arrived >> lane & 1) make_ready(first_thread + lane);
  }
}

void meet(const char* name, WarpRule rule, uint32_t mask, void* argument, Combine combine,
          const void* pc) {
  const LeaveKernel leave;
  Launch& launch = current_launch();
  Thread& me = current_thread();
  const uint32_t lane = me.linear % 32;
  Warp& warp = launch.warp[me.linear / 32];
  if (!(mask >> lane & 1)) {
    fail(std::string("divergent warp: ") + describe_thread(global_linear(me)) + " executes " +
             name + " with a mask that does not name its own lane",
         {pc});
  }
  if (rule == WarpRule::kAligned && (mask & warp.exited)) {
    fail(std::string("divergent warp: ") + describe_thread(global_linear(me)) + " executes " +
             name + ", but lanes of its warp have left the kernel or do not exist",
         {pc});
  }
  size_t index = 0;
  while (index < warp.open.size() &&
         (warp.open[index].combine != combine || warp.open[index].mask != mask)) {
    ++index;
  }
  if (index == warp.open.size()) {
    warp.open.push_back({name, rule, mask, 0, {}, combine});
  }
  warp.open[index].arrived |= 1u << lane;
  warp.open[index].arguments[lane] = argument;
  if (complete(warp.open[index], warp)) finish(warp, me.linear / 32 * 32, index);
  wait_at(name, mask, pc);
}

}  // namespace

void warp_rendezvous(const char* name, WarpRule rule, uint32_t mask, void* argument,
                     Combine combine, Place place) {
  meet(name, rule, mask, argument, combine, place ? place : __builtin_return_address(0));
}

void warp_barrier(uint32_t mask) {
  meet(kWarpBarrier, WarpRule::kNamedLanes, mask, nullptr, nullptr, __builtin_return_address(0));
}

void leave_warp(Thread& thread) {
  Launch& launch = current_launch();
  Warp& warp = launch.warp[thread.linear / 32];
  warp.exited |= 1u << thread.linear % 32;
  for (size_t i = 0; i < warp.open.size();) {
    if (complete(warp.open[i], warp)) {
      finish(warp, thread.linear / 32 * 32, i);
    } else {
      ++i;
    }
  }
}

}  // namespace pumice::emulator
