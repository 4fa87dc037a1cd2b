// Sixteen rows in the lanes of a 512-bit register.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr int kRowLanes = 16;
using RowWords = __m512i;

// load(row) gives 16 bytes of it. Four rows of a register lie apart, so that four registers are
// transposed within 128-bit lanes alone.
template <typename Load>
inline __attribute__((always_inline)) void transpose_rows(const uint8_t* const (&rows)[kRowLanes],
                                                          const Load& load, RowWords (&words)[4]) {
  __m512i r[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_castsi128_si512(load(rows[i]));
    r[i] = _mm512_inserti32x4(r[i], load(rows[4 + i]), 1);
    r[i] = _mm512_inserti32x4(r[i], load(rows[8 + i]), 2);
    r[i] = _mm512_inserti32x4(r[i], load(rows[12 + i]), 3);
  }
  const __m512i low = _mm512_unpacklo_epi32(r[0], r[1]), high = _mm512_unpackhi_epi32(r[0], r[1]);
  const __m512i low2 = _mm512_unpacklo_epi32(r[2], r[3]), high2 = _mm512_unpackhi_epi32(r[2], r[3]);
  words[0] = _mm512_unpacklo_epi64(low, low2);
  words[1] = _mm512_unpackhi_epi64(low, low2);
  words[2] = _mm512_unpacklo_epi64(high, high2);
  words[3] = _mm512_unpackhi_epi64(high, high2);
}

// Lane i of words[t] = bytes [at + 4t, at + 4t + 4) of rows[i].
inline void load_words(const uint8_t* const (&rows)[kRowLanes], int64_t at, RowWords (&words)[4]) {
  transpose_rows(
      rows,
      [at](const uint8_t* row) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + at));
      },
      words);
}

// The same of the `count` bytes that are left, 1 … 16, and zeros behind them.
inline void load_words(const uint8_t* const (&rows)[kRowLanes], int64_t at, int64_t count,
                       RowWords (&words)[4]) {
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1u);
  transpose_rows(
      rows, [at, mask](const uint8_t* row) { return _mm_maskz_loadu_epi8(mask, row + at); }, words);
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
