// The CUDA device environment, for kernel sources that the C++ compiler compiles: see
// csrc/cuda/device.h. The names are CUDA's; what they mean is in the CUDA programming guide.
#pragma once

#ifndef PUMICE_EMULATED
#error "the emulator's headers are for sources compiled with PUMICE_EMULATED"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator/runtime.h"

// Shared memory is dynamic only: pumice::cuda::dynamic_shared_memory<T>().
#undef __shared__
#define __shared__ shared_memory_is_dynamic_only

// Advice to a compiler that is not at work here.
#undef __launch_bounds__
#define __launch_bounds__(...)

// Set whenever a thread gets its turn.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

inline void __syncthreads() { pumice::emulator::block_barrier(false); }
inline int __syncthreads_count(int predicate) {
  return pumice::emulator::block_barrier(predicate != 0);
}
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) != 0; }
inline int __syncthreads_and(int predicate) {
  return __syncthreads_count(predicate) == pumice::emulator::block_threads();
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { pumice::emulator::warp_barrier(mask); }

inline void __threadfence() { pumice::emulator::thread_fence(); }
// Orders nothing that the emulator's rules of visibility between threads of a block rest on.
inline void __threadfence_block() {}

template <class T>
inline T __ldg(const T* address) {
  return *address;
}

[[noreturn]] inline void __trap() { pumice::emulator::kernel_error("trap", "executes __trap()"); }

#include "emulator/atomics.h"
#include "emulator/intrinsics.h"
#include "emulator/warp.h"
