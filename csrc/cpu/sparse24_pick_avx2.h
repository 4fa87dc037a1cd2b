// Eight kept weights with AVX2: vpermilps picks, by two bits in each 32-bit lane, from the four
// floats of a group.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr int kFloats = 8;
using Lanes = __m256;
using Places = __m256i;

inline Lanes zero_lanes() { return _mm256_setzero_ps(); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }

// The places of lane j in its two lowest bits; those above are not looked at.
inline Places load_places(const uint8_t* meta) {
  uint16_t half;
  std::memcpy(&half, meta, sizeof(half));
  return _mm256_srlv_epi32(_mm256_set1_epi32(half), _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
}

// Two of every four lanes from either register.
inline Lanes pick(const float* x, Places places) {
  const __m256 first = _mm256_permutevar_ps(_mm256_loadu_ps(x), places);
  const __m256 second = _mm256_permutevar_ps(_mm256_loadu_ps(x + kFloats), places);
  return _mm256_blend_ps(first, second, 0xcc);
}

template <DType kDtype>
inline Lanes load_values(const void* values, int64_t j) {
  if constexpr (kDtype == DType::kFloat32) {
    return _mm256_loadu_ps(static_cast<const float*>(values) + j);
  }
  const __m128i half =
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(values) + j));
  if constexpr (kDtype == DType::kFloat16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

template <DType kDtype>
inline Lanes load_values(const void* values, int64_t j, int64_t count) {
  constexpr size_t kSize = kDtype == DType::kFloat32 ? 4 : 2;
  alignas(32) char first[kFloats * kSize] = {};
  std::memcpy(first, static_cast<const char*>(values) + j * kSize,
              static_cast<size_t>(count) * kSize);
  return load_values<kDtype>(first, 0);
}

inline float sum_of(Lanes x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
