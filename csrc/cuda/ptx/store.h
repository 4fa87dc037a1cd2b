// Stores of a given width.
#pragma once

#include "cuda/device.h"

namespace pumice::ptx {

// 16 bytes as one instruction. A plain store of a uint4 whose words were put together from 16-bit
// halves is taken apart again by the compiler, into four stores of 4 bytes.
__device__ __forceinline__ void store_16(void* global, const uint4& v) {
#ifdef PUMICE_EMULATED
  *static_cast<uint4*>(global) = v;
#else
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"l"(global), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
#endif
}

// The same of 8 bytes.
__device__ __forceinline__ void store_8(void* global, const uint2& v) {
#ifdef PUMICE_EMULATED
  *static_cast<uint2*>(global) = v;
#else
  asm volatile("st.global.v2.u32 [%0], {%1, %2};\n" ::"l"(global), "r"(v.x), "r"(v.y) : "memory");
#endif
}

}  // namespace pumice::ptx
