// Packed 2:4 weights of 8 rows with AVX2: vpmaddubsw multiplies digits, as unsigned bytes, by
// signed weights and adds pairs into 16 bits. A pair is at most 2·255·15 in magnitude, so that two
// of them cannot saturate; then vpmaddwd widens them to 8 int32 lanes.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/sparse24_int4_panel.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

inline IntLanes integers(int32_t x) { return _mm256_set1_epi32(x); }
inline IntLanes add(IntLanes a, IntLanes b) { return _mm256_add_epi32(a, b); }
inline IntLanes subtract(IntLanes a, IntLanes b) { return _mm256_sub_epi32(a, b); }
inline IntLanes multiply(IntLanes a, IntLanes b) { return _mm256_mullo_epi32(a, b); }
inline IntLanes times_256(IntLanes a) { return _mm256_slli_epi32(a, 8); }
// A small integer as the four bytes of a lane.
inline IntLanes four_times(Lanes x) {
  return multiply(_mm256_cvtps_epi32(x), integers(0x01010101));
}
inline IntLanes sum_bytes(IntLanes bytes) {  // unsigned, of each lane
  return _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, _mm256_set1_epi8(1)), _mm256_set1_epi16(1));
}

// Of two bytes of places, the nibbles of four groups, in the low bytes of 16-bit lanes: the byte of
// the chunk, 4 · group + place, of each group's first and second weight.
inline void find_places(IntLanes bytes, IntLanes (&places)[2]) {
  const __m256i bases = _mm256_set1_epi32(0x0c080400), place = _mm256_set1_epi8(3);
  const __m256i nibbles = _mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4));
  places[0] = _mm256_or_si256(_mm256_and_si256(nibbles, place), bases);
  places[1] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(nibbles, 2), place), bases);
}

inline Kept decode_word(IntLanes word, IntLanes zero, IntLanes& sum) {
  const __m256i low = _mm256_set1_epi8(0x0f);
  const __m256i first = _mm256_and_si256(word, low);
  const __m256i second = _mm256_and_si256(_mm256_srli_epi32(word, 4), low);
  sum = _mm256_add_epi8(sum, _mm256_add_epi8(first, second));
  return {{_mm256_sub_epi8(first, zero), _mm256_sub_epi8(second, zero)}, {}};
}

// Two chunks from their words and their word of places; zero has four bytes of a zero point in each
// lane. The nibbles are added to the bytes of `sum`.
inline __attribute__((always_inline)) void decode(IntLanes word, IntLanes next, IntLanes meta,
                                                  IntLanes zero, Kept (&kept)[2], IntLanes& sum) {
  // Bytes 2i and 2i + 1 of a word of places, each followed by a zero.
  const __m256i low =
      _mm256_broadcastsi128_si256(_mm_setr_epi32(0x80018000, 0x80058004, 0x80098008, 0x800d800c));
  const __m256i high =
      _mm256_broadcastsi128_si256(_mm_setr_epi32(0x80038002, 0x80078006, 0x800b800a, 0x800f800e));
  kept[0] = decode_word(word, zero, sum);
  kept[1] = decode_word(next, zero, sum);
  find_places(_mm256_shuffle_epi8(meta, low), kept[0].places);
  find_places(_mm256_shuffle_epi8(meta, high), kept[1].places);
}

inline IntLanes add_products(IntLanes sum, const uint8_t* x, const Kept& kept) {
  const __m256i chunk =
      _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(x)));
  const __m256i first =
      _mm256_maddubs_epi16(_mm256_shuffle_epi8(chunk, kept.places[0]), kept.weights[0]);
  const __m256i second =
      _mm256_maddubs_epi16(_mm256_shuffle_epi8(chunk, kept.places[1]), kept.weights[1]);
  return add(sum, _mm256_madd_epi16(_mm256_add_epi16(first, second), _mm256_set1_epi16(1)));
}

inline Kept for_tiles(const Kept& kept) { return kept; }

inline Kept ones_at(Kept kept) {
  kept.weights[0] = kept.weights[1] = _mm256_set1_epi8(1);
  return kept;
}

// Rows of x whose sums stay in registers.
template <int kPlanes>
constexpr int kSparseTileRows = 4;

// sums[r] = Σ over `chunks` of the products of row r's term, two digits of it, `offset` added to
// each digit's. x has for each digit kBlockChunks chunks of kRows rows.
template <int kRows>
inline __attribute__((always_inline)) void dot(const Kept* kept, const uint8_t* x, int64_t chunks,
                                               IntLanes offset, IntLanes (&sums)[kRows]) {
  IntLanes acc[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) acc[r] = offset;
#pragma GCC unroll 1
  for (int p = 0; p < 2; ++p, x += kBlockChunks * kRows * kChunk) {
#pragma GCC unroll 1
    for (int64_t c = 0; c < chunks; ++c) {
      const Kept of_chunk = kept[c];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        acc[r] = add_products(acc[r], x + (c * kRows + r) * kChunk, of_chunk);
      }
    }
    if (p == 0) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) acc[r] = add(times_256(acc[r]), offset);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sums[r] = acc[r];
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
