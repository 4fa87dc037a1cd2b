// Eight rows in the lanes of a 256-bit register.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr int kRowLanes = 8;
using RowWords = __m256i;

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
  const __m256i low = _mm256_unpacklo_epi32(r[0], r[1]), high = _mm256_unpackhi_epi32(r[0], r[1]);
  const __m256i low2 = _mm256_unpacklo_epi32(r[2], r[3]), high2 = _mm256_unpackhi_epi32(r[2], r[3]);
  words[0] = _mm256_unpacklo_epi64(low, low2);
  words[1] = _mm256_unpackhi_epi64(low, low2);
  words[2] = _mm256_unpacklo_epi64(high, high2);
  words[3] = _mm256_unpackhi_epi64(high, high2);
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

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
