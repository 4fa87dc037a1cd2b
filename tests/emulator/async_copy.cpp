// cp.async: what is copied lies aside until its thread has waited for it.
#include <cstring>

#include "emulator/checker.h"
#include "emulator/device_memory.h"

namespace pumice::emulator {

void cp_async(void* shared, const void* global, uint32_t bytes, uint32_t valid_bytes) {
  const LeaveKernel leave;
  const void* pc = __builtin_return_address(0);
  if (valid_bytes > bytes) kernel_error("cp.async", "copies more bytes than the instruction has");
  check_shared_address("cp.async", shared, bytes, pc);
  const uintptr_t destination = reinterpret_cast<uintptr_t>(shared);
  AsyncCopy copy = {static_cast<uint32_t>(destination - shared_base()), bytes, 0, {}, pc};
  if (valid_bytes > 0) {
    check_global_address("cp.async", global, bytes, pc);
    check_access(reinterpret_cast<uintptr_t>(global), valid_bytes, AccessKind::kRead, pc);
    std::memcpy(copy.data, global, valid_bytes);
  }
  check_access(destination, bytes, AccessKind::kAsyncIssue, pc);
  Thread& me = current_thread();
  copy.group = me.copy_group;
  me.copies.push_back(copy);
}

void cp_async_commit() { ++current_thread().copy_group; }

void cp_async_wait(int pending_groups) {
  const LeaveKernel leave;
  Thread& me = current_thread();
  // Copies are in order of their groups, those not committed yet last.
  size_t landed = 0;
  for (const AsyncCopy& copy : me.copies) {
    if (copy.group + static_cast<uint32_t>(pending_groups) >= me.copy_group) break;
    const uintptr_t destination = shared_base() + copy.offset;
    check_access(destination, copy.bytes, AccessKind::kAsyncLanding, copy.pc);
    std::memcpy(reinterpret_cast<void*>(destination), copy.data, copy.bytes);
    ++landed;
  }
  me.copies.erase(me.copies.begin(), me.copies.begin() + static_cast<std::ptrdiff_t>(landed));
}

}  // namespace pumice::emulator
