// Sixteen packed words of kept weights, of 256 columns, with AVX-512 VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/int4_words_avx512vnni.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr int kRegisterBytes = 64;

// For each lane of 16 bytes: words 0 and 1 of four (low), words 2 and 3 (high), of a word the four
// first and then the four second weights of its groups.
struct WordBytes {
  __m512i low, high;
};

inline WordBytes interleave(__m512i first, __m512i second) {
  return {_mm512_unpacklo_epi32(first, second), _mm512_unpackhi_epi32(first, second)};
}

inline WordBytes kept_bytes(const uint32_t* words) {
  const Nibbles nibbles = load_words(words);
  return interleave(nibbles.even, nibbles.odd);
}

inline WordBytes kept_bytes(const uint32_t* words, int64_t count) {
  const Nibbles nibbles = load_words(words, count);
  return interleave(nibbles.even, nibbles.odd);
}

// Where they lie in the chunk of 16 columns of their word: 4 · group + place. Of each byte of meta
// the two nibbles come to lie in two bytes.
inline WordBytes places_of(__m256i meta) {
  const __m512i bases = _mm512_set1_epi32(0x0c080400), place = _mm512_set1_epi8(3);
  const __m512i bytes = _mm512_cvtepu8_epi16(meta);
  const __m512i nibbles = _mm512_or_si512(bytes, _mm512_slli_epi16(bytes, 4));
  return interleave(
      _mm512_ternarylogic_epi32(nibbles, place, bases, 0xea),  // (nibbles & place) | bases
      _mm512_ternarylogic_epi32(_mm512_srli_epi16(nibbles, 2), place, bases, 0xea));
}

inline WordBytes word_places(const uint8_t* meta) {
  return places_of(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(meta)));
}

inline WordBytes word_places(const uint8_t* meta, int64_t count) {
  return places_of(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1u), meta));
}

// The digits of 256 columns, ordered by order_chunks, that the weights multiply.
inline WordBytes pick(const int8_t* x, const WordBytes& places) {
  constexpr __mmask64 kSecond = 0xff00ff00ff00ff00;
  const __m512i low = _mm512_shuffle_epi8(_mm512_loadu_si512(x), places.low);
  const __m512i high = _mm512_shuffle_epi8(_mm512_loadu_si512(x + 2 * kRegisterBytes), places.high);
  return {
      _mm512_mask_shuffle_epi8(low, kSecond, _mm512_loadu_si512(x + kRegisterBytes), places.low),
      _mm512_mask_shuffle_epi8(high, kSecond, _mm512_loadu_si512(x + 3 * kRegisterBytes),
                               places.high)};
}

// Σ bytes · (256 · first digit + second digit) of each four, of one register
inline IntLanes dot_digits(__m512i bytes, __m512i first, __m512i second) {
  const __m512i high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), bytes, first);
  return _mm512_dpbusd_epi32(_mm512_slli_epi32(high, 8), bytes, second);
}

// and of both.
inline IntLanes dot_digits(const WordBytes& bytes, const WordBytes& first,
                           const WordBytes& second) {
  const __m512i high = _mm512_dpbusd_epi32(
      _mm512_dpbusd_epi32(_mm512_setzero_si512(), bytes.low, first.low), bytes.high, first.high);
  return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_slli_epi32(high, 8), bytes.low, second.low),
                             bytes.high, second.high);
}

inline __m512i all_ones() { return _mm512_set1_epi8(1); }

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
