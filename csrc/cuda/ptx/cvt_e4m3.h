// cvt.rn.f16x2.e4m3x2 (sm_89): two float8 e4m3 to fp16, exactly. NaN of either sign becomes 0x7fff.
#pragma once

#include "cuda/device.h"

namespace pumice::ptx {

// The value of a byte, as fp16: its exponent's bias is 8 less.
__device__ __forceinline__ uint32_t e4m3_bits_to_f16_bits(uint32_t byte) {
  const uint32_t sign = (byte & 0x80u) << 8, magnitude = byte & 0x7fu;
  if (magnitude == 0x7fu) return 0x7fffu;
  if (magnitude >= 8) return sign | ((magnitude << 7) + (8u << 10));
  // A subnormal, magnitude · 2^-9, is normal in fp16.
  if (magnitude == 0) return sign;
  const uint32_t exponent = magnitude >= 4 ? 2 : magnitude >= 2 ? 1 : 0;
  return sign | (exponent + 15 - 9) << 10 | (magnitude << (10 - exponent) & 0x3ffu);
}

// The bytes in the low half of `pair` to the halves of the result.
__device__ __forceinline__ uint32_t e4m3x2_to_f16x2(uint32_t pair) {
#if defined(PUMICE_EMULATED) || __CUDA_ARCH__ < 890
  return e4m3_bits_to_f16_bits(pair & 0xffu) | e4m3_bits_to_f16_bits(pair >> 8 & 0xffu) << 16;
#else
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;\n" : "=r"(halves) : "h"(static_cast<uint16_t>(pair)));
  return halves;
#endif
}

}  // namespace pumice::ptx
