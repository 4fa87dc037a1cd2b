// What a cache stores of a number, and back: float8 e4m3 (1 sign, 4 exponent bits of bias 7, 3 of
// mantissa; no infinities, one NaN; Micikevicius et al., 2022) and int8. In the namespace of the
// instruction set, as element.h.
#pragma once

#include <algorithm>

#include "common/paged_cache.h"
#include "cpu/element.h"

namespace pumice::cpu::PUMICE_ISA {

constexpr float kLargestFloat8 = 448.0f;

// Float8 to float16 by two shifts, for the biases of the exponents are 8 apart: the float16 with
// the byte's bits is x · 2^-8, exactly. With the sign in the two highest bits before, the second of
// them must go. Only the magnitude of NaN carries into that bit when one is added to its last
// place, and with it set all bits of the exponent are.
constexpr float kFloat8OfFloat16 = 256.0f;
inline uint16_t float8_to_float16_bits(uint8_t x) {
  const uint16_t bits = static_cast<uint16_t>(static_cast<int8_t>(x) * 0x80) & 0xbf80u;
  return static_cast<uint16_t>(bits | ((bits + 0x80u) & 0x4000u));
}

#if defined(__AVX2__) && defined(__F16C__)
// The same of eight or sixteen bytes.
inline __m128i float8_to_float16(__m128i eight) {
  const __m128i shifted = _mm_slli_epi16(_mm_cvtepi8_epi16(eight), 7);
  const __m128i bits = _mm_and_si128(shifted, _mm_set1_epi16(static_cast<int16_t>(0xbf80)));
  const __m128i carried = _mm_add_epi16(bits, _mm_set1_epi16(0x80));
  return _mm_or_si128(bits, _mm_and_si128(carried, _mm_set1_epi16(0x4000)));
}
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
inline __m256i float8_to_float16_wide(__m128i sixteen) {
  const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepi8_epi16(sixteen), 7);
  const __m256i bits = _mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<int16_t>(0xbf80)));
  const __m256i carried = _mm256_add_epi16(bits, _mm256_set1_epi16(0x80));
  return _mm256_or_si256(bits, _mm256_and_si256(carried, _mm256_set1_epi16(0x4000)));
}
#endif

// out[i] = float(x[i])
inline void load_float8(const uint8_t* x, int64_t count, float* out) {
  int64_t i = 0;
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  for (; i + 16 <= count; i += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
    const __m512 scaled = _mm512_cvtph_ps(float8_to_float16_wide(bytes));
    _mm512_storeu_ps(out + i, _mm512_mul_ps(scaled, _mm512_set1_ps(kFloat8OfFloat16)));
  }
#elif defined(__AVX2__) && defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x + i));
    const __m256 scaled = _mm256_cvtph_ps(float8_to_float16(bytes));
    _mm256_storeu_ps(out + i, _mm256_mul_ps(scaled, _mm256_set1_ps(kFloat8OfFloat16)));
  }
#endif
  for (; i < count; ++i) {
    out[i] = float16_to_float(float8_to_float16_bits(x[i])) * kFloat8OfFloat16;
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
