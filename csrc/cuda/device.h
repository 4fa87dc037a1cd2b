// What every CUDA source includes first: the CUDA environment, or the emulator's imitation of it.
//
// A kernel source is compiled twice: by nvcc for the GPU, and by the C++ compiler with
// PUMICE_EMULATED for the CPU (tests/emulator). Both see the real cuda_fp16.h and cuda_bf16.h.
#pragma once

#ifdef PUMICE_EMULATED
#include "emulator/device.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#endif

namespace pumice::cuda {

constexpr int kWarpSize = 32;
constexpr uint32_t kFullWarp = 0xffffffffu;

// The base of the block's shared memory. All shared memory is dynamic: its size is then one number,
// given at the launch, which the launcher can check and the emulator can guard.
template <class T>
__device__ __forceinline__ T* dynamic_shared_memory() {
#ifdef PUMICE_EMULATED
  return static_cast<T*>(emulator::shared_memory());
#else
  // One name and one type for every T, as all of them are one piece of memory. 1024 bytes is what
  // the largest swizzle pattern of Hopper's TMA asks for; the hardware's base meets it.
  extern __shared__ __align__(1024) unsigned char pumice_dynamic_shared_memory[];
  return reinterpret_cast<T*>(pumice_dynamic_shared_memory);
#endif
}

// Thread index within a one-dimensional block, cut into warps.
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / kWarpSize; }

}  // namespace pumice::cuda
