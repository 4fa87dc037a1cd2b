// Sixteen kept weights with AVX-512: vpermilps picks, by two bits in each 32-bit lane, from the
// four floats of a group.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "common/dtype.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr int kFloats = 16;
using Lanes = __m512;
using Places = __m512i;

inline Lanes zero_lanes() { return _mm512_setzero_ps(); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }

// The places of lane j in its two lowest bits; those above are not looked at.
inline Places load_places(const uint8_t* meta) {
  const __m512i shifts =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  int32_t word;
  __builtin_memcpy(&word, meta, sizeof(word));
  return _mm512_srlv_epi32(_mm512_set1_epi32(word), shifts);
}

// Two of every four lanes from either register.
inline Lanes pick(const float* x, Places places) {
  const __m512 first = _mm512_permutevar_ps(_mm512_loadu_ps(x), places);
  return _mm512_mask_permutevar_ps(first, 0xcccc, _mm512_loadu_ps(x + kFloats), places);
}

template <DType kDtype>
inline Lanes load_values(const void* values, int64_t j, int64_t count = kFloats) {
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1u);
  if constexpr (kDtype == DType::kFloat32) {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(values) + j);
  }
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(values) + j);
  if constexpr (kDtype == DType::kFloat16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline float sum_of(Lanes x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m256 high = _mm256_castsi256_ps(_mm512_extracti64x4_epi64(bits, 1));
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
