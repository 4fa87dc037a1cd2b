// Loads and stores with a caching hint.
#pragma once

#include "cuda/device.h"

namespace pumice::ptx {

// 16 bytes of data that no thread writes during the launch and that this SM reads once (weights):
// by the read-only path, not kept in L1. The address must be a multiple of 16.
__device__ __forceinline__ uint4 load_streaming_16(const void* global) {
#ifdef PUMICE_EMULATED
  return emulator::load_read_only<uint4>(global);
#else
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(global));
  return v;
#endif
}

// The same for 8 and 4 bytes.
__device__ __forceinline__ uint2 load_streaming_8(const void* global) {
#ifdef PUMICE_EMULATED
  return emulator::load_read_only<uint2>(global);
#else
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];\n"
               : "=r"(v.x), "=r"(v.y)
               : "l"(global));
  return v;
#endif
}

__device__ __forceinline__ uint32_t load_streaming_4(const void* global) {
#ifdef PUMICE_EMULATED
  return emulator::load_read_only<uint32_t>(global);
#else
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];\n" : "=r"(v) : "l"(global));
  return v;
#endif
}

}  // namespace pumice::ptx
