// Eight rows in the lanes of a 256-bit register.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr int kRowLanes = 8;
using RowWords = __m256i;

// Transposes the four rows of four words in each 128-bit lane.
inline __attribute__((always_inline)) void transpose_halves(const __m256i* r, RowWords* words) {
  const __m256i low = _mm256_unpacklo_epi32(r[0], r[1]), high = _mm256_unpackhi_epi32(r[0], r[1]);
  const __m256i low2 = _mm256_unpacklo_epi32(r[2], r[3]), high2 = _mm256_unpackhi_epi32(r[2], r[3]);
  words[0] = _mm256_unpacklo_epi64(low, low2);
  words[1] = _mm256_unpackhi_epi64(low, low2);
  words[2] = _mm256_unpacklo_epi64(high, high2);
  words[3] = _mm256_unpackhi_epi64(high, high2);
}

// load(row) gives 16 bytes of it. The two rows of a register lie apart, so that four registers are
// transposed within 128-bit lanes alone.
template <typename Load>
inline __attribute__((always_inline)) void transpose_rows(const uint8_t* const (&rows)[kRowLanes],
                                                          const Load& load, RowWords (&words)[4]) {
  __m256i r[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(load(rows[i])), load(rows[4 + i]), 1);
  }
  transpose_halves(r, words);
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
  transpose_rows(
      rows,
      [at, count](const uint8_t* row) {
        alignas(16) uint8_t bytes[16] = {};
        std::memcpy(bytes, row + at, static_cast<size_t>(count));
        return _mm_load_si128(reinterpret_cast<const __m128i*>(bytes));
      },
      words);
}

// A square: lane i of words[t] = bytes [at + 4t, at + 4t + 4) of rows[i]; zeros from `count` bytes
// on, a multiple of 4.
inline void load_square(const uint8_t* const (&rows)[kRowLanes], int64_t at, int64_t count,
                        RowWords (&words)[kRowLanes]) {
  __m256i r[8], q[8];
  if (count >= 32) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      r[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[i] + at));
    }
  } else {
    const __m256i word = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count / 4)), word);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      r[i] = _mm256_maskload_epi32(reinterpret_cast<const int*>(rows[i] + at), mask);
    }
  }
  transpose_halves(r, q);
  transpose_halves(r + 4, q + 4);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    words[j] = _mm256_permute2x128_si256(q[j], q[4 + j], 0x20);
    words[4 + j] = _mm256_permute2x128_si256(q[j], q[4 + j], 0x31);
  }
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
