// Tiles of int8 dot products with AVX-512 VNNI.
//
// vpdpbusd multiplies 64 unsigned by 64 signed bytes and adds groups of four into int32 lanes,
// wrapping. Weights become unsigned by flipping their top bit, w + 128 (once per weight register,
// amortised over the rows of the tile), and 128·Σ_k q[m,k] is taken off at the end. Sums wrap
// modulo 2^32 on the way and the result fits an int32, so it is exact for every int8 value.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/int8_tile.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

// 24 accumulators, 4 weight registers, 1 of activations, the constant: 30 of 32.
constexpr int kTileM = 6;
constexpr int kTileN = 4;

// For each row the sum of q.
int64_t prepared_row_bytes(int64_t /*k*/) { return sizeof(int32_t); }
int64_t streamed_row_bytes(int64_t k) { return k; }

__mmask64 tail_mask(int64_t k) { return (uint64_t{1} << (k % 64)) - 1; }

void prepare_row(const int8_t* q, int64_t k, int64_t row, void* prepared) {
  const __m512i ones = _mm512_set1_epi8(1);
  const int8_t* x = q + row * k;
  __m512i sum = _mm512_setzero_si512();
  int64_t l = 0;
  for (; l + 64 <= k; l += 64) sum = _mm512_dpbusd_epi32(sum, ones, _mm512_loadu_si512(x + l));
  sum = _mm512_dpbusd_epi32(sum, ones, _mm512_maskz_loadu_epi8(tail_mask(k), x + l));
  static_cast<int32_t*>(prepared)[row] = _mm512_reduce_add_epi32(sum);
}

// The sums over the lanes of four registers.
__m128i reduce_four(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i abcd =
      _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

template <int kRows>
void dot_tile(const int8_t* q, const void* prepared, int64_t row, int64_t k,
              const int8_t* const (&weight_rows)[kTileN], const Prefetch& prefetch,
              int32_t (*sums)[kTileN]) {
  const __m512i flip = _mm512_set1_epi8(-128);
  const int8_t* x = q + row * k;
  const int8_t* w0 = weight_rows[0];
  const int8_t* w1 = weight_rows[1];
  const int8_t* w2 = weight_rows[2];
  const int8_t* w3 = weight_rows[3];
  __m512i acc[kRows][kTileN];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kTileN; ++j) acc[i][j] = _mm512_setzero_si512();
  }
  const auto step = [&](int64_t l, auto load) __attribute__((always_inline)) {
    const __m512i w[kTileN] = {
        _mm512_xor_si512(load(w0 + l), flip), _mm512_xor_si512(load(w1 + l), flip),
        _mm512_xor_si512(load(w2 + l), flip), _mm512_xor_si512(load(w3 + l), flip)};
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const __m512i xi = load(x + i * k + l);
#pragma GCC unroll 8
      for (int j = 0; j < kTileN; ++j) acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], w[j], xi);
    }
  };
  const int64_t whole = k / 64 * 64;
  if (whole < k) {
    const __mmask64 mask = tail_mask(k);
    step(whole, [mask](const int8_t* p) { return _mm512_maskz_loadu_epi8(mask, p); });
  }
  for (int64_t l = 0; l < whole; l += 64) {
#pragma GCC unroll 8
    for (int s = 0; s < kPrefetchStreams; ++s) {
      _mm_prefetch(prefetch.first + s * prefetch.stride + (l >> prefetch.shift), _MM_HINT_T1);
    }
    step(l, [](const int8_t* p) { return _mm512_loadu_si512(p); });
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    const int32_t row_sum = static_cast<const int32_t*>(prepared)[row + i];
    const __m128i raw = reduce_four(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
    const __m128i exact = _mm_sub_epi32(raw, _mm_slli_epi32(_mm_set1_epi32(row_sum), 7));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums[i]), exact);
  }
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
