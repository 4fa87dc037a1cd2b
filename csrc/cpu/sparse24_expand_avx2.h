// Groups written out with AVX2: a group of 1-byte or 2-byte elements is a lane, into which the kept
// ones are shifted; of 4-byte elements it is a 128-bit lane, and a table says how bytes move.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace pumice::cpu::PUMICE_ISA {
namespace {

inline uint32_t load_word(const uint8_t* meta) {
  uint32_t word;
  std::memcpy(&word, meta, sizeof(word));
  return word;
}

// Where the first and the second kept byte of eight groups go, in bits; the nibbles of a word.
struct Shifts {
  __m256i first, second;
};

inline Shifts byte_shifts(const uint8_t* meta) {
  const __m256i nibbles = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(load_word(meta))),
                                            _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
  const __m256i three = _mm256_set1_epi32(3 << 3);
  return {_mm256_and_si256(_mm256_slli_epi32(nibbles, 3), three),
          _mm256_and_si256(_mm256_slli_epi32(nibbles, 1), three)};
}

inline void expand_bytes(const uint8_t* values, const uint8_t* meta, uint8_t* w) {
  const __m256i pairs =
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
  const Shifts shifts = byte_shifts(meta);
  const __m256i first = _mm256_and_si256(pairs, _mm256_set1_epi32(0xff));
  const __m256i second = _mm256_srli_epi32(pairs, 8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(w),
                      _mm256_or_si256(_mm256_sllv_epi32(first, shifts.first),
                                      _mm256_sllv_epi32(second, shifts.second)));
}

inline void expand_halves(const uint8_t* values, const uint8_t* meta, uint8_t* w) {
  const __m256i word = _mm256_set1_epi64x(load_word(meta));
  const __m256i three = _mm256_set1_epi64x(3 << 4);
  for (int half = 0; half < 2; ++half) {  // of the word: four groups
    const __m256i at =
        half == 0 ? _mm256_setr_epi64x(0, 4, 8, 12) : _mm256_setr_epi64x(16, 20, 24, 28);
    const __m256i nibbles = _mm256_srlv_epi64(word, at);
    const __m256i pairs = _mm256_cvtepu32_epi64(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + 16 * half)));
    const __m256i first = _mm256_and_si256(pairs, _mm256_set1_epi64x(0xffff));
    const __m256i second = _mm256_srli_epi64(pairs, 16);
    const __m256i first_at = _mm256_and_si256(_mm256_slli_epi64(nibbles, 4), three);
    const __m256i second_at = _mm256_and_si256(_mm256_slli_epi64(nibbles, 2), three);
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(w + 32 * half),
        _mm256_or_si256(_mm256_sllv_epi64(first, first_at), _mm256_sllv_epi64(second, second_at)));
  }
}

// For each byte of a group its place in a pair of 4-byte elements, or 0x80 for zero.
struct GroupShuffles {
  alignas(16) uint8_t bytes[16][16];

  constexpr GroupShuffles() : bytes() {
    for (int nibble = 0; nibble < 16; ++nibble) {
      for (int i = 0; i < 16; ++i) bytes[nibble][i] = 0x80;
      for (int i = 0; i < 4; ++i) {
        bytes[nibble][(nibble & 3) * 4 + i] = static_cast<uint8_t>(i);
        bytes[nibble][(nibble >> 2) * 4 + i] = static_cast<uint8_t>(4 + i);
      }
    }
  }
};
constexpr GroupShuffles kGroupShuffles;

inline void expand_words(const uint8_t* values, const uint8_t* meta, uint8_t* w) {
  const uint32_t word = load_word(meta);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const uint8_t* shuffle = kGroupShuffles.bytes[word >> (4 * i) & 15];
    const __m128i pair = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values + 8 * i));
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(w + 16 * i),
        _mm_shuffle_epi8(pair, _mm_load_si128(reinterpret_cast<const __m128i*>(shuffle))));
  }
}

// Eight groups share a word of meta.
template <int kElement>
inline int64_t expand_groups(const uint8_t* values, const uint8_t* meta, int64_t groups,
                             uint8_t* w) {
  int64_t g = 0;
  for (; g + 8 <= groups; g += 8) {
    const auto expand = kElement == 1 ? expand_bytes : kElement == 2 ? expand_halves : expand_words;
    expand(values + 2 * g * kElement, meta + g / 2, w + 4 * g * kElement);
  }
  return g;
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
