// Panels of 16 weight rows with AVX-512 VNNI: vpdpbusd multiplies 64 nibbles, as unsigned bytes, by
// 64 signed digits and adds groups of four into 16 int32 lanes.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/int4_kernels.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr int kPanel = 16;
using Lanes = __m512;
using IntLanes = __m512i;

inline Lanes broadcast(float x) { return _mm512_set1_ps(x); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline Lanes negative_multiply_add(Lanes a, Lanes b, Lanes c) { return _mm512_fnmadd_ps(a, b, c); }
inline Lanes to_float(__m512i x) { return _mm512_cvtepi32_ps(x); }

inline __mmask16 first(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffffu : (1u << count) - 1u);
}

// out = in transposed, a square of 16 × 16 words.
inline void transpose(__m512i (&r)[16]) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  // b[4i + j]: column j of each 128-bit lane, of rows 4i … 4i+3.
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 16
  for (int j = 0; j < 4; ++j) {
    const __m512i low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
    const __m512i high = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
    const __m512i high_odd = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
    r[j] = _mm512_shuffle_i32x4(low, high, 0x88);
    r[4 + j] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(low, high, 0xdd);
    r[12 + j] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
  }
}

inline void transpose_floats(Lanes (&r)[16]) {
  __m512i bits[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) bits[i] = _mm512_castps_si512(r[i]);
  transpose(bits);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_castsi512_ps(bits[i]);
}

// The first `count` of 16 elements from data[begin] on, others zero.
inline Lanes load_floats(const void* data, DType dtype, int64_t begin, int64_t count) {
  const __mmask16 mask = first(count);
  if (dtype == DType::kFloat32) {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(data) + begin);
  }
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(data) + begin);
  if (dtype == DType::kFloat16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline Lanes load_bytes(const uint8_t* data, int64_t count) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(count), data)));
}

// nibbles[word][even, odd][row][4] from `count` words of each row; words to come are fetched.
inline void load_nibbles(const uint32_t* const (&rows)[kPanel], int64_t begin, int64_t count,
                         int64_t ahead, uint8_t* nibbles) {
  const __mmask16 mask = first(count);
  const __m512i low = _mm512_set1_epi8(0x0f);
  __m512i words[kPanel];
#pragma GCC unroll 16
  for (int i = 0; i < kPanel; ++i) {
    words[i] = _mm512_maskz_loadu_epi32(mask, rows[i] + begin);
    _mm_prefetch(reinterpret_cast<const char*>(rows[i] + begin + ahead), _MM_HINT_T1);
  }
  transpose(words);
#pragma GCC unroll 16
  for (int t = 0; t < kBlockWords; ++t) {
    __m512i* out = reinterpret_cast<__m512i*>(nibbles) + 2 * t;
    _mm512_store_si512(out, _mm512_and_si512(words[t], low));
    _mm512_store_si512(out + 1, _mm512_and_si512(_mm512_srli_epi32(words[t], 4), low));
  }
}

// sums[r] = Σ over words [begin, end) and bytes of (nibbles · digits of row r)
//         + 256 · the same of the digits before, kPlanes - 1 times.
template <int kRows, int kPlanes>
inline void dot(const uint8_t* nibbles, const int32_t* digits, int64_t begin, int64_t end,
                __m512i (&sums)[kRows]) {
  // A sum must wait four cycles for its predecessor: few rows take several sums each.
  constexpr int kChains = kRows >= 4 ? 1 : 2;
  __m512i acc[kRows][kChains];
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r) sums[r] = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int p = 0; p < kPlanes; ++p) {
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) {
      acc[r][0] = _mm512_slli_epi32(sums[r], 8);
      for (int c = 1; c < kChains; ++c) acc[r][c] = _mm512_setzero_si512();
    }
    const __m512i* w = reinterpret_cast<const __m512i*>(nibbles) + 2 * begin;
    const int32_t* x = digits + (p * kBlockWords + begin) * 2 * kRows;
    for (int64_t t = begin; t < end; ++t, w += 2, x += 2 * kRows) {
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        const __m512i weights = _mm512_load_si512(w + odd);
#pragma GCC unroll 32
        for (int r = 0; r < kRows; ++r) {
          __m512i& sum = acc[r][odd % kChains];
          sum = _mm512_dpbusd_epi32(sum, weights, _mm512_set1_epi32(x[odd * kRows + r]));
        }
      }
    }
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) {
      sums[r] = acc[r][0];
      for (int c = 1; c < kChains; ++c) sums[r] = _mm512_add_epi32(sums[r], acc[r][c]);
    }
  }
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
