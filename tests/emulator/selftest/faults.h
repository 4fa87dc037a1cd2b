// Kernels with a planted fault each, and the same kernels repaired. Emulator only.
//
// Every kernel takes x and y of 256 floats and runs in 2 blocks of 64 threads.
#pragma once

#include <array>
#include <map>
#include <string>

#include "selftest.h"

namespace pumice::cuda {

constexpr int kThreads = 64, kBlocks = 2, kSize = 256;
constexpr size_t kSharedBytes = kThreads * 16;

using FaultKernel = void (*)(const float*, float*);
using FaultTable = std::map<std::string, std::array<FaultKernel, 2>>;  // with the fault, repaired

FaultTable thread_faults();
FaultTable async_faults();
FaultTable global_faults();

#define FAULT(kernel)                        \
  {                                          \
    #kernel, { kernel<false>, kernel<true> } \
  }
#define THREAD_ELEMENT (blockIdx.x * kThreads + threadIdx.x)

// All threads write zeros and wait, so that what follows is not about memory that was never
// written.
__device__ inline void clear_shared_memory() {
  dynamic_shared_memory<float4>()[threadIdx.x] = {};
  __syncthreads();
}

}  // namespace pumice::cuda
