// Tiles of int8 dot products with AVX2: vpmaddwd multiplies 16 pairs of int16 and adds neighbours
// into int32, exactly for every int8 value.
//
// vpmaddubsw would take bytes, but unsigned ones times signed ones, and its sums of two such
// products saturate at 16 bits: it takes an absolute value, a sign transfer (wrong for -128) and a
// widening on top, as many instructions for each product as this.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/int8_tile.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

// 12 accumulators, a weight register and a product; activations are used from memory.
constexpr int kTileM = 3;
constexpr int kTileN = 4;

// q as int16, rows padded with zeros to whole registers: widened once for all weight rows.
int64_t padded(int64_t k) { return (k + 15) / 16 * 16; }

int64_t prepared_row_bytes(int64_t k) { return padded(k) * int64_t{sizeof(int16_t)}; }
int64_t streamed_row_bytes(int64_t k) { return prepared_row_bytes(k); }

void prepare_row(const int8_t* q, int64_t k, int64_t row, void* prepared) {
  int16_t* x = static_cast<int16_t*>(prepared) + row * padded(k);
  for (int64_t l = 0; l < k; ++l) x[l] = q[row * k + l];
  for (int64_t l = k; l < padded(k); ++l) x[l] = 0;
}

// The sums over the lanes of four registers.
__m128i reduce_four(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i abcd = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  return _mm_add_epi32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256(abcd, 1));
}

template <int kRows>
void dot_tile(const int8_t* /*q*/, const void* prepared, int64_t row, int64_t k,
              const int8_t* const (&weight_rows)[kTileN], const Prefetch& prefetch,
              int32_t (*sums)[kTileN]) {
  const int64_t stride = padded(k);
  const int16_t* x = static_cast<const int16_t*>(prepared) + row * stride;
  __m256i acc[kRows][kTileN];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kTileN; ++j) acc[i][j] = _mm256_setzero_si256();
  }
  const auto step = [&](int64_t l, const int8_t* const(&w)[kTileN],
                        int64_t at) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int j = 0; j < kTileN; ++j) {
      const __m256i wj =
          _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w[j] + at)));
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const __m256i xi = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i * stride + l));
        acc[i][j] = _mm256_add_epi32(acc[i][j], _mm256_madd_epi16(wj, xi));
      }
    }
  };
  const int8_t* w0 = weight_rows[0];
  const int8_t* w1 = weight_rows[1];
  const int8_t* w2 = weight_rows[2];
  const int8_t* w3 = weight_rows[3];
  int64_t l = 0;
  for (; l + 16 <= k; l += 16) {
    if (l % 64 == 0) {
#pragma GCC unroll 8
      for (int s = 0; s < kPrefetchStreams; ++s) {
        _mm_prefetch(prefetch.first + s * prefetch.stride + (l >> prefetch.shift), _MM_HINT_T1);
      }
    }
    step(l, {w0, w1, w2, w3}, l);
  }
  if (l < k) {
    // x is zero there, but the bytes past the end of a weight row are not ours to read.
    alignas(16) int8_t tail[kTileN][16] = {};
    for (int j = 0; j < kTileN; ++j) {
      for (int64_t t = l; t < k; ++t) tail[j][t - l] = weight_rows[j][t];
    }
    step(l, {tail[0], tail[1], tail[2], tail[3]}, 0);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums[i]),
                     reduce_four(acc[i][0], acc[i][1], acc[i][2], acc[i][3]));
  }
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
