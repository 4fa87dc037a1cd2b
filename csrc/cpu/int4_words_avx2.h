// Eight words of a weight row with AVX2: vpmaddubsw adds pairs of products of nibbles, as unsigned
// bytes, and signed digits into 16 bits, which four of them, at most 2·15·128 each, cannot
// saturate; vpmaddwd widens them, and multiplies by the worth of the digit as it does.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/int4_kernels.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr int kWords = 8;
using Lanes = __m256;
using IntLanes = __m256i;

// Even and odd k of each word, as bytes.
struct Nibbles {
  __m256i even, odd;
};

inline Lanes broadcast(float x) { return _mm256_set1_ps(x); }
inline Lanes load_lanes(const float* x) { return _mm256_loadu_ps(x); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
inline Lanes negative_multiply_add(Lanes a, Lanes b, Lanes c) { return _mm256_fnmadd_ps(a, b, c); }
inline Lanes to_float(IntLanes x) { return _mm256_cvtepi32_ps(x); }

inline float sum_of(Lanes x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// table[index[i]], of the first 8 elements of the table
inline Lanes choose(const float* table, const int32_t* index) {
  const __m256i which = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
  return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), which);
}

inline Nibbles load_words(const uint32_t* words) {
  const __m256i low = _mm256_set1_epi8(0x0f);
  const __m256i eight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
  return {_mm256_and_si256(eight, low), _mm256_and_si256(_mm256_srli_epi32(eight, 4), low)};
}

// The first `count` words, others zero.
inline Nibbles load_words(const uint32_t* words, int64_t count) {
  uint32_t copy[kWords] = {};
  std::memcpy(copy, words, static_cast<size_t>(count) * sizeof(uint32_t));
  return load_words(copy);
}

// For each word Σ nibble · x, x of kDigits digits.
template <int kDigits>
inline IntLanes dot_words(const Nibbles& w, const int32_t* x) {
  const auto digit = [&](int p, int worth) __attribute__((always_inline)) {
    const int32_t* values = x + p * 2 * kBlockWords;
    const __m256i even = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    const __m256i odd = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + kBlockWords));
    const __m256i pairs =
        _mm256_add_epi16(_mm256_maddubs_epi16(w.even, even), _mm256_maddubs_epi16(w.odd, odd));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(static_cast<int16_t>(worth)));
  };
  if constexpr (kDigits == 1) return digit(0, 1);
  return _mm256_add_epi32(digit(0, 256), digit(1, 1));
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
