// Groups written out with AVX-512: by shuffles of bytes, which a table of the sixteen nibbles in
// registers gives; elements of 4 bytes by vpexpandd.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace pumice::cpu::PUMICE_ISA {
namespace {

// bytes[nibble]: for each byte of a group its place in the pair of kept elements, or 0x80 for zero.
template <int kElement>
struct GroupShuffles {
  alignas(64) uint8_t bytes[16][4 * kElement];

  constexpr GroupShuffles() : bytes() {
    for (int nibble = 0; nibble < 16; ++nibble) {
      for (int i = 0; i < 4 * kElement; ++i) bytes[nibble][i] = 0x80;
      for (int i = 0; i < kElement; ++i) {
        bytes[nibble][(nibble & 3) * kElement + i] = static_cast<uint8_t>(i);
        bytes[nibble][(nibble >> 2) * kElement + i] = static_cast<uint8_t>(kElement + i);
      }
    }
  }
};
template <int kElement>
constexpr GroupShuffles<kElement> kGroupShuffles;

// Of a byte of meta, the columns of its two groups as bits.
struct ColumnTable {
  uint8_t columns[256];

  constexpr ColumnTable() : columns() {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      columns[byte] = static_cast<uint8_t>((1u << (byte & 3) | 1u << (byte >> 2 & 3)) |
                                           (16u << (byte >> 4 & 3) | 16u << (byte >> 6)));
    }
  }
};
constexpr ColumnTable kColumnTable;

// Sixteen groups of bytes, a group a 32-bit lane; the pairs of a 128-bit lane lie in its low half.
inline int64_t expand_bytes(const uint8_t* values, const uint8_t* meta, int64_t groups,
                            uint8_t* w) {
  const __m512i table = _mm512_load_si512(kGroupShuffles<1>.bytes);
  const __m512i pair = _mm512_set4_epi32(0x06060606, 0x04040404, 0x02020202, 0);
  const __m512i spread = _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3);
  int64_t g = 0;
  for (; g + 16 <= groups; g += 16) {
    const __m512i bytes =
        _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(meta + g / 2)));
    const __m512i nibbles = _mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28));
    const __m512i shuffle = _mm512_or_si512(_mm512_permutexvar_epi32(nibbles, table), pair);
    const __m256i kept = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 2 * g));
    const __m512i pairs = _mm512_permutexvar_epi64(spread, _mm512_castsi256_si512(kept));
    _mm512_storeu_si512(w + 4 * g, _mm512_shuffle_epi8(pairs, shuffle));
  }
  return g;
}

// Eight groups of 2-byte elements, a group a 64-bit lane.
inline int64_t expand_halves(const uint8_t* values, const uint8_t* meta, int64_t groups,
                             uint8_t* w) {
  const __m512i low = _mm512_load_si512(kGroupShuffles<2>.bytes);
  const __m512i high = _mm512_load_si512(kGroupShuffles<2>.bytes[8]);
  const __m512i pair = _mm512_set4_epi64(0x0404040404040404, 0, 0x0404040404040404, 0);
  const __m512i spread = _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3);
  const __m512i at = _mm512_setr_epi64(0, 4, 8, 12, 16, 20, 24, 28);
  int64_t g = 0;
  for (; g + 8 <= groups; g += 8) {
    uint32_t word;
    std::memcpy(&word, meta + g / 2, sizeof(word));
    const __m512i nibbles = _mm512_srlv_epi64(_mm512_set1_epi64(word), at);
    const __m512i shuffle = _mm512_or_si512(_mm512_permutex2var_epi64(low, nibbles, high), pair);
    const __m256i kept = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 4 * g));
    const __m512i pairs = _mm512_permutexvar_epi64(spread, _mm512_castsi256_si512(kept));
    _mm512_storeu_si512(w + 8 * g, _mm512_shuffle_epi8(pairs, shuffle));
  }
  return g;
}

inline int64_t expand_words(const uint8_t* values, const uint8_t* meta, int64_t groups,
                            uint8_t* w) {
  int64_t g = 0;
  for (; g + 4 <= groups; g += 4) {
    const __mmask16 mask = static_cast<__mmask16>(kColumnTable.columns[meta[g / 2]] |
                                                  kColumnTable.columns[meta[g / 2 + 1]] << 8);
    const __m256i kept = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 8 * g));
    _mm512_storeu_si512(w + 16 * g, _mm512_maskz_expand_epi32(mask, _mm512_castsi256_si512(kept)));
  }
  return g;
}

template <int kElement>
inline int64_t expand_groups(const uint8_t* values, const uint8_t* meta, int64_t groups,
                             uint8_t* w) {
  const auto expand = kElement == 1 ? expand_bytes : kElement == 2 ? expand_halves : expand_words;
  return expand(values, meta, groups, w);
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
