// What a cache of bytes stores of a number: float8 e4m3 (1 sign, 4 exponent bits of bias 7, 3 of
// mantissa; no infinities, one NaN; Micikevicius et al., 2022) and int8. The bits are those of the
// CPU (csrc/cpu/cache_element.h); the instruction that converts (from sm_89 on) would lose a NaN's
// sign, and what is written here waits for memory anyway.
#pragma once

#include "cuda/element.h"

namespace pumice::cuda {

// To nearest, ties to even; beyond ±448, infinity too, ±448; NaN stays.
__device__ __forceinline__ uint8_t float_to_float8(float x) {
  constexpr uint32_t kLargest = 0x43e00000u;  // 448
  const auto bits = bits_as<uint32_t>(x);
  const uint32_t sign = bits >> 24 & 0x80u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint8_t>(sign | 0x7fu);
  magnitude = magnitude < kLargest ? magnitude : kLargest;
  if (magnitude < 121u << 23) {  // below 2^-6: the last bit of a sum with 2^14 is worth 2^-9
    const float sum = __fadd_rn(bits_as<float>(magnitude), 16384.0f);
    return static_cast<uint8_t>(sign | (bits_as<uint32_t>(sum) & 0x7fu));
  }
  const uint32_t rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1u);
  return static_cast<uint8_t>(sign | ((rounded - (120u << 23)) >> 20));
}

// To nearest, ties to even; beyond ±127 ±127; NaN becomes 0.
__device__ __forceinline__ int8_t float_to_int8(float x) {
  if (!(x == x)) return 0;
  return static_cast<int8_t>(rintf(fminf(fmaxf(x, -127.0f), 127.0f)));
}

}  // namespace pumice::cuda
