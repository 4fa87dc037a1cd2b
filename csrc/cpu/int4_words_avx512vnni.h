// Sixteen words of a weight row with AVX-512 VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/int4_kernels.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr int kWords = 16;
using Lanes = __m512;
using IntLanes = __m512i;

// Even and odd k of each word, as bytes.
struct Nibbles {
  __m512i even, odd;
};

inline Lanes broadcast(float x) { return _mm512_set1_ps(x); }
inline Lanes load_lanes(const float* x) { return _mm512_loadu_ps(x); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline Lanes negative_multiply_add(Lanes a, Lanes b, Lanes c) { return _mm512_fnmadd_ps(a, b, c); }
inline Lanes to_float(IntLanes x) { return _mm512_cvtepi32_ps(x); }

inline float sum_of(Lanes x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m256 high = _mm256_castsi256_ps(_mm512_extracti64x4_epi64(bits, 1));
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// table[index[i]], of the first 16 elements of the table
inline Lanes choose(const float* table, const int32_t* index) {
  return _mm512_permutexvar_ps(_mm512_loadu_si512(index), _mm512_loadu_ps(table));
}

inline Nibbles split(__m512i words) {
  const __m512i low = _mm512_set1_epi8(0x0f);
  return {_mm512_and_si512(words, low), _mm512_and_si512(_mm512_srli_epi32(words, 4), low)};
}

inline Nibbles load_words(const uint32_t* words) { return split(_mm512_loadu_si512(words)); }

// The first `count` words, others zero.
inline Nibbles load_words(const uint32_t* words, int64_t count) {
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1u);
  return split(_mm512_maskz_loadu_epi32(mask, words));
}

// For each word Σ nibble · x, x of kDigits digits.
template <int kDigits>
inline IntLanes dot_words(const Nibbles& w, const int32_t* x) {
  __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 2
  for (int p = 0; p < kDigits; ++p, x += 2 * kBlockWords) {
    if (p > 0) sum = _mm512_slli_epi32(sum, 8);
    sum = _mm512_dpbusd_epi32(sum, w.even, _mm512_loadu_si512(x));
    sum = _mm512_dpbusd_epi32(sum, w.odd, _mm512_loadu_si512(x + kBlockWords));
  }
  return sum;
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
