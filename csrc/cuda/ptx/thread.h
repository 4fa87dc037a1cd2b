// Special registers.
#pragma once

#include "cuda/device.h"

namespace pumice::ptx {

// threadIdx.x, read here and now. What is computed from threadIdx.x itself does not change in a
// loop, and the compiler computes it before the loop and keeps it; after a main loop that needs all
// registers, computing it again is cheaper than keeping it.
__device__ __forceinline__ int thread_index_here() {
#ifdef PUMICE_EMULATED
  return static_cast<int>(threadIdx.x);
#else
  int index;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(index));
  return index;
#endif
}

}  // namespace pumice::ptx
