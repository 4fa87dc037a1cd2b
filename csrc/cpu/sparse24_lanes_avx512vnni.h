// Sixteen rows in the lanes of a 512-bit register.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr int kRowLanes = 16;
using RowWords = __m512i;

// Transposes the four rows of four words in each 128-bit lane.
inline __attribute__((always_inline)) void transpose_quarters(const __m512i* r, RowWords* words) {
  const __m512i low = _mm512_unpacklo_epi32(r[0], r[1]), high = _mm512_unpackhi_epi32(r[0], r[1]);
  const __m512i low2 = _mm512_unpacklo_epi32(r[2], r[3]), high2 = _mm512_unpackhi_epi32(r[2], r[3]);
  words[0] = _mm512_unpacklo_epi64(low, low2);
  words[1] = _mm512_unpackhi_epi64(low, low2);
  words[2] = _mm512_unpacklo_epi64(high, high2);
  words[3] = _mm512_unpackhi_epi64(high, high2);
}

// load(row) gives 16 bytes of it. Four rows of a register lie apart, so that four registers are
// transposed within 128-bit lanes alone.
template <typename Load>
inline __attribute__((always_inline)) void transpose_rows(const uint8_t* const (&rows)[kRowLanes],
                                                          const Load& load, RowWords (&words)[4]) {
  __m512i r[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    // Into half a register twice: into a whole one each load takes a shuffle too on Zen 4.
    const auto half = [&](int row) {
      return _mm256_inserti128_si256(_mm256_castsi128_si256(load(rows[row])), load(rows[4 + row]),
                                     1);
    };
    r[i] = _mm512_inserti64x4(_mm512_castsi256_si512(half(i)), half(8 + i), 1);
  }
  transpose_quarters(r, words);
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

// A square: lane i of words[t] = bytes [at + 4t, at + 4t + 4) of rows[i]; zeros from `count` bytes
// on, a multiple of 4.
inline void load_square(const uint8_t* const (&rows)[kRowLanes], int64_t at, int64_t count,
                        RowWords (&words)[kRowLanes]) {
  const __mmask16 mask = static_cast<__mmask16>(count >= 64 ? 0xffffu : (1u << count / 4) - 1u);
  __m512i r[16], q[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_maskz_loadu_epi32(mask, rows[i] + at);
  // Lane l of q[4i + j] is word 4l + j of rows 4i … 4i + 3.
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) transpose_quarters(r + i, q + i);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i even = _mm512_shuffle_i32x4(q[j], q[4 + j], 0x88);
    const __m512i odd = _mm512_shuffle_i32x4(q[j], q[4 + j], 0xdd);
    const __m512i even2 = _mm512_shuffle_i32x4(q[8 + j], q[12 + j], 0x88);
    const __m512i odd2 = _mm512_shuffle_i32x4(q[8 + j], q[12 + j], 0xdd);
    words[j] = _mm512_shuffle_i32x4(even, even2, 0x88);
    words[4 + j] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
    words[8 + j] = _mm512_shuffle_i32x4(even, even2, 0xdd);
    words[12 + j] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
  }
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
