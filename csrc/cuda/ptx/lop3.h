// lop3 (sm_50): any logical function of three words in one instruction.
#pragma once

#include "cuda/device.h"

namespace pumice::ptx {

// (a & mask) | bits. With both constants known the compiler takes two instructions, as one has room
// for a single constant.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) {
#ifdef PUMICE_EMULATED
  return (a & mask) | bits;
#else
  constexpr int kAndOr = (0xf0 & 0xcc) | 0xaa;  // the function's table
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;\n" : "=r"(d) : "r"(a), "r"(mask), "r"(bits), "n"(kAndOr));
  return d;
#endif
}

}  // namespace pumice::ptx
