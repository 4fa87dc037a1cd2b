// cp.async (sm_80): copies from global to shared memory that do not pass through registers, so that
// a thread can have the next tiles under way while it multiplies the present one.
//
// A thread's copies since its last commit form a group; wait<N> returns when all but the thread's N
// newest groups have landed. That makes the data visible to the *waiting thread only*: the others
// may read it after the next __syncthreads().
#pragma once

#include "cuda/device.h"

namespace pumice::ptx {

// 16 bytes, past L1 (.cg): tiles are read once from global memory. With fewer valid_bytes the rest
// of the 16 becomes zero, and with none the source address is not read at all, which is how edges
// of a matrix are padded. Both addresses must be multiples of 16.
__device__ __forceinline__ void cp_async_16_partial(void* shared, const void* global,
                                                    uint32_t valid_bytes) {
#ifdef PUMICE_EMULATED
  emulator::cp_async(shared, global, 16, valid_bytes);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(global),
               "r"(valid_bytes)
               : "memory");
#endif
}

__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  cp_async_16_partial(shared, global, valid ? 16 : 0);
}

// The small sizes exist only through L1 (.ca); for rows whose start is not a multiple of 16 bytes.
__device__ __forceinline__ void cp_async_8(void* shared, const void* global, bool valid) {
#ifdef PUMICE_EMULATED
  emulator::cp_async(shared, global, 8, valid ? 8 : 0);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(address), "l"(global),
               "r"(valid ? 8 : 0)
               : "memory");
#endif
}

__device__ __forceinline__ void cp_async_4(void* shared, const void* global, bool valid) {
#ifdef PUMICE_EMULATED
  emulator::cp_async(shared, global, 4, valid ? 4 : 0);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(address), "l"(global),
               "r"(valid ? 4 : 0)
               : "memory");
#endif
}

// Closes the group. An empty group is one too: a pipeline commits one every step, so that its
// wait<N> means the same step at the end of the loop as in the middle.
__device__ __forceinline__ void cp_async_commit() {
#ifdef PUMICE_EMULATED
  emulator::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

template <int kPendingGroups>
__device__ __forceinline__ void cp_async_wait() {
#ifdef PUMICE_EMULATED
  emulator::cp_async_wait(kPendingGroups);
#else
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPendingGroups) : "memory");
#endif
}

}  // namespace pumice::ptx
