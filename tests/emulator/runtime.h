// What device code reaches the emulator by. Everything here may only be called from a kernel.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pumice::emulator {

// A sm_80 block's largest shared memory.
constexpr size_t kSharedMemoryLimit = 163 * 1024;

// On a function whose loads and stores are the emulator's, not the kernel's.
#define PUMICE_EMULATOR_UNCHECKED __attribute__((no_sanitize("thread")))

void* shared_memory();

// __syncthreads(); returns how many threads of the block passed a true predicate.
int block_barrier(bool predicate);
int block_threads();

// __threadfence().
void thread_fence();

int lane_id();

// Where a fault is to be reported; null stands for the place of the call.
using Place = const void*;

// A rendezvous of the lanes in `mask`: each brings an argument, the last to arrive calls
// combine(lanes, present), lanes[i] being lane i's argument where bit i of present is set, and all
// go on. Lanes that have left the kernel are not waited for unless the instruction is `aligned`,
// that is, undefined unless the whole warp executes it.
enum class WarpRule { kNamedLanes, kAligned };
using Combine = void (*)(void* const* lanes, uint32_t present);
void warp_rendezvous(const char* name, WarpRule rule, uint32_t mask, void* argument,
                     Combine combine, Place place = nullptr);

// __syncwarp(): the one warp collective that also orders memory.
void warp_barrier(uint32_t mask);

// Stops the launch with a message about the calling thread.
[[noreturn]] void kernel_error(const char* kind, const char* detail);

// The checks of one access by the calling thread, as the compiler's instrumentation makes them.
void check_read(const void* address, size_t bytes);
void check_write(void* address, size_t bytes);
void check_atomic(void* address, size_t bytes);

// Fails unless the address is in shared memory and a multiple of `alignment`.
void check_shared_address(const char* instruction, const void* address, size_t alignment);

void cp_async(void* shared, const void* global, uint32_t bytes, uint32_t valid_bytes);
void cp_async_commit();
void cp_async_wait(int pending_groups);

void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// mma.sp::ordered_metadata. Metadata that the instruction does not define is reported.
void mma_sp_m16n8k64_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                        uint32_t metadata);
void mma_sp_m16n8k32_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                         uint32_t metadata, int selector);
void mma_sp_m16n8k32_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                          uint32_t metadata, int selector);

}  // namespace pumice::emulator
