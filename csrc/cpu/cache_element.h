// What a cache stores of a number, and back: float8 e4m3 (1 sign, 4 exponent bits of bias 7, 3 of
// mantissa; no infinities, one NaN; Micikevicius et al., 2022) and int8. In the namespace of the
// instruction set, as element.h.
#pragma once

#include <algorithm>

#include "common/paged_cache.h"
#include "cpu/element.h"

namespace pumice::cpu::PUMICE_ISA {

constexpr float kLargestFloat8 = 448.0f;

// The float16 of x · 2^-8, exactly: the biases of the exponents are 8 apart.
inline uint16_t float8_to_float16_bits(uint8_t x) {
  const uint16_t wide = x, magnitude = wide & 0x7fu;
  const uint16_t nan = magnitude == 0x7fu ? 0x7e00u : 0u;  // no infinity, one NaN
  return static_cast<uint16_t>(magnitude << 7 | (wide & 0x80u) << 8 | nan);
}

// out[i] = float(x[i])
inline void load_float8(const uint8_t* x, int64_t count, float* out) {
  constexpr int64_t kPiece = 64;
  uint16_t halves[kPiece];
  for (int64_t i = 0; i < count; i += kPiece) {
    const int64_t n = std::min(kPiece, count - i);
    for (int64_t j = 0; j < n; ++j) halves[j] = float8_to_float16_bits(x[i + j]);
    load_elements(halves, DType::kFloat16, 0, n, out + i);
    for (int64_t j = 0; j < n; ++j) out[i + j] *= 256.0f;
  }
}

// To nearest, ties to even; beyond ±448, infinity too, ±448; NaN stays.
inline uint8_t float_to_float8(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 24 & 0x80u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint8_t>(sign | 0x7fu);
  magnitude = std::min(magnitude, std::bit_cast<uint32_t>(kLargestFloat8));
  if (magnitude < 121u << 23) {  // below 2^-6: the last bit of a sum with 2^14 is worth 2^-9
    const float sum = std::bit_cast<float>(magnitude) + 0x1p14f;
    return static_cast<uint8_t>(sign | (std::bit_cast<uint32_t>(sum) & 0x7fu));
  }
  const uint32_t rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1u);
  return static_cast<uint8_t>(sign | ((rounded - (120u << 23)) >> 20));
}

// To nearest, ties to even; beyond ±127 ±127; NaN becomes 0.
inline int8_t float_to_int8(float x) {
  if (!(x == x)) return 0;
  return static_cast<int8_t>(__builtin_rintf(std::clamp(x, -127.0f, 127.0f)));
}

// out[i] = float(data[begin + i]), a stored byte without its scale
inline void load_stored(const void* data, CacheType type, DType dtype, int64_t begin, int64_t count,
                        float* out) {
  if (type == CacheType::kQuery) return load_elements(data, dtype, begin, count, out);
  if (type == CacheType::kFloat8E4M3) {
    load_float8(static_cast<const uint8_t*>(data) + begin, count, out);
  } else {
    const int8_t* x = static_cast<const int8_t*>(data) + begin;
    for (int64_t i = 0; i < count; ++i) out[i] = x[i];
  }
}

}  // namespace pumice::cpu::PUMICE_ISA
