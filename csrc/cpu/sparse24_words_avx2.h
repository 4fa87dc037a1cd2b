// Eight packed words of kept weights, of 128 columns, with AVX2.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/int4_words_avx2.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr int kRegisterBytes = 32;

// For each lane of 16 bytes: words 0 and 1 of four (low), words 2 and 3 (high), of a word the four
// first and then the four second weights of its groups.
struct WordBytes {
  __m256i low, high;
};

inline WordBytes interleave(__m256i first, __m256i second) {
  return {_mm256_unpacklo_epi32(first, second), _mm256_unpackhi_epi32(first, second)};
}

inline WordBytes kept_bytes(const uint32_t* words) {
  const Nibbles nibbles = load_words(words);
  return interleave(nibbles.even, nibbles.odd);
}

inline WordBytes kept_bytes(const uint32_t* words, int64_t count) {
  uint32_t first[kWords] = {};
  std::memcpy(first, words, static_cast<size_t>(count) * sizeof(uint32_t));
  return kept_bytes(first);
}

// Where they lie in the chunk of 16 columns of their word: 4 · group + place. Of each byte of meta
// the two nibbles come to lie in two bytes.
inline WordBytes word_places(const uint8_t* meta) {
  const __m256i bases = _mm256_set1_epi32(0x0c080400), place = _mm256_set1_epi8(3);
  const __m256i bytes =
      _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(meta)));
  const __m256i nibbles = _mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4));
  return interleave(_mm256_or_si256(_mm256_and_si256(nibbles, place), bases),
                    _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(nibbles, 2), place), bases));
}

inline WordBytes word_places(const uint8_t* meta, int64_t count) {
  uint8_t first[2 * kWords] = {};
  std::memcpy(first, meta, static_cast<size_t>(2 * count));
  return word_places(first);
}

// The digits of 128 columns, ordered by order_chunks, that the weights multiply.
inline WordBytes pick(const int8_t* x, const WordBytes& places) {
  const auto from = [x](int source, __m256i of) {
    const int8_t* digits = x + source * kRegisterBytes;
    return _mm256_shuffle_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(digits)), of);
  };
  return {_mm256_blend_epi32(from(0, places.low), from(1, places.low), 0xcc),
          _mm256_blend_epi32(from(2, places.high), from(3, places.high), 0xcc)};
}

// Σ bytes · (256 · first digit + second digit) of each four, of one register
inline IntLanes dot_digits(__m256i bytes, __m256i first, __m256i second) {
  const __m256i high = _mm256_maddubs_epi16(bytes, first);
  const __m256i low = _mm256_maddubs_epi16(bytes, second);
  return _mm256_add_epi32(_mm256_madd_epi16(high, _mm256_set1_epi16(256)),
                          _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
}

// and of both. Four products of a nibble and a byte stay within 16 bits.
inline IntLanes dot_digits(const WordBytes& bytes, const WordBytes& first,
                           const WordBytes& second) {
  const __m256i high = _mm256_add_epi16(_mm256_maddubs_epi16(bytes.low, first.low),
                                        _mm256_maddubs_epi16(bytes.high, first.high));
  const __m256i low = _mm256_add_epi16(_mm256_maddubs_epi16(bytes.low, second.low),
                                       _mm256_maddubs_epi16(bytes.high, second.high));
  return _mm256_add_epi32(_mm256_madd_epi16(high, _mm256_set1_epi16(256)),
                          _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
}

inline __m256i all_ones() { return _mm256_set1_epi8(1); }

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
