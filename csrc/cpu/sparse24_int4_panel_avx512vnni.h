// Packed 2:4 weights of 16 rows with AVX-512 VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/sparse24_int4_panel.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

inline IntLanes integers(int32_t x) { return _mm512_set1_epi32(x); }
inline IntLanes add(IntLanes a, IntLanes b) { return _mm512_add_epi32(a, b); }
inline IntLanes subtract(IntLanes a, IntLanes b) { return _mm512_sub_epi32(a, b); }
inline IntLanes multiply(IntLanes a, IntLanes b) { return _mm512_mullo_epi32(a, b); }
inline IntLanes times_256(IntLanes a) { return _mm512_slli_epi32(a, 8); }
// A small integer as the four bytes of a lane.
inline IntLanes four_times(Lanes x) {
  return multiply(_mm512_cvtps_epi32(x), integers(0x01010101));
}
inline IntLanes sum_bytes(IntLanes bytes) {  // unsigned, of each lane
  return _mm512_dpbusd_epi32(integers(0), bytes, _mm512_set1_epi8(1));
}

// Of two bytes of places, the nibbles of four groups, in the low bytes of 16-bit lanes: the byte of
// the chunk, 4 · group + place, of each group's first and second weight.
inline void find_places(IntLanes bytes, IntLanes (&places)[2]) {
  const __m512i bases = _mm512_set1_epi32(0x0c080400), place = _mm512_set1_epi8(3);
  const __m512i nibbles = _mm512_or_si512(bytes, _mm512_slli_epi16(bytes, 4));
  // (nibbles & place) | bases
  places[0] = _mm512_ternarylogic_epi32(nibbles, place, bases, 0xea);
  places[1] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(nibbles, 2), place, bases, 0xea);
}

inline Kept decode_word(IntLanes word, IntLanes zero, IntLanes& sum) {
  const __m512i low = _mm512_set1_epi8(0x0f);
  const __m512i first = _mm512_and_si512(word, low);
  const __m512i second = _mm512_and_si512(_mm512_srli_epi32(word, 4), low);
  sum = _mm512_add_epi8(sum, _mm512_add_epi8(first, second));
  return {{_mm512_sub_epi8(first, zero), _mm512_sub_epi8(second, zero)}, {}};
}

// Two chunks from their words and their word of places; zero has four bytes of a zero point in each
// lane. The nibbles are added to the bytes of `sum`.
inline __attribute__((always_inline)) void decode(IntLanes word, IntLanes next, IntLanes meta,
                                                  IntLanes zero, Kept (&kept)[2], IntLanes& sum) {
  // Bytes 2i and 2i + 1 of a word of places, each followed by a zero.
  const __m512i low = _mm512_set4_epi32(0x800d800c, 0x80098008, 0x80058004, 0x80018000);
  const __m512i high = _mm512_set4_epi32(0x800f800e, 0x800b800a, 0x80078006, 0x80038002);
  kept[0] = decode_word(word, zero, sum);
  kept[1] = decode_word(next, zero, sum);
  find_places(_mm512_shuffle_epi8(meta, low), kept[0].places);
  find_places(_mm512_shuffle_epi8(meta, high), kept[1].places);
}

inline IntLanes add_products(IntLanes sum, const uint8_t* x, const Kept& kept) {
  const __m512i chunk = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(x)));
  sum = _mm512_dpbusd_epi32(sum, _mm512_shuffle_epi8(chunk, kept.places[0]), kept.weights[0]);
  return _mm512_dpbusd_epi32(sum, _mm512_shuffle_epi8(chunk, kept.places[1]), kept.weights[1]);
}

// Low halves of two registers, and high halves.
inline void exchange_halves(IntLanes (&r)[2]) {
  const __m512i low = _mm512_set1_epi32(0xffff), first = r[0];
  // low ? … : …
  r[0] = _mm512_ternarylogic_epi32(low, first, _mm512_slli_epi32(r[1], 16), 0xca);
  r[1] = _mm512_ternarylogic_epi32(low, _mm512_srli_epi32(first, 16), r[1], 0xca);
}

// The weights of two groups to a register: these eight columns are broadcast by a load alone, while
// all sixteen take a shuffle too, a quarter of a tile's time on Zen 4. (A lane of 128 bits then
// holds the eight bytes twice, so that places stay what they are.)
inline Kept for_tiles(Kept kept) {
  exchange_halves(kept.weights);
  exchange_halves(kept.places);
  return kept;
}

inline Kept ones_at(Kept kept) {
  kept.weights[0] = kept.weights[1] = _mm512_set1_epi8(1);
  return kept;
}

// Rows of x whose sums stay in registers.
template <int kPlanes>
constexpr int kSparseTileRows = kPlanes == 2 ? 8 : 4;

// sums[r] = Σ over `chunks` of the products of row r's term, two digits of it, `offset` added to
// each digit's. x has for each digit kBlockChunks chunks of kRows rows.
template <int kRows>
inline __attribute__((always_inline)) void dot(const Kept* kept, const uint8_t* x, int64_t chunks,
                                               IntLanes offset, IntLanes (&sums)[kRows]) {
  constexpr int64_t kPlane = kBlockChunks * kRows * kChunk;
  IntLanes acc[kRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = offset;
#pragma GCC unroll 1
  for (int64_t c = 0; c < chunks; ++c, x += kRows * kChunk) {
    const Kept of_chunk = kept[c];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int p = 0; p < 2; ++p) {
        int64_t eight[2];
        std::memcpy(eight, x + p * kPlane + r * kChunk, sizeof(eight));
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const __m512i picked =
              _mm512_shuffle_epi8(_mm512_set1_epi64(eight[i]), of_chunk.places[i]);
          acc[r][p] = _mm512_dpbusd_epi32(acc[r][p], picked, of_chunk.weights[i]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sums[r] = add(times_256(acc[r][0]), acc[r][1]);
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
