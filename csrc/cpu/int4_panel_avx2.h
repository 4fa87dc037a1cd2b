// Panels of 8 weight rows with AVX2: vpmaddubsw multiplies 32 nibbles, as unsigned bytes, by 32
// signed digits and adds pairs into 16 bits. A pair is at most 2·15·128 in magnitude, so eight of
// them cannot saturate; then vpmaddwd widens them to 8 int32 lanes.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/int4_kernels.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr int kPanel = 8;
using Lanes = __m256;
using IntLanes = __m256i;

inline Lanes broadcast(float x) { return _mm256_set1_ps(x); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
inline Lanes negative_multiply_add(Lanes a, Lanes b, Lanes c) { return _mm256_fnmadd_ps(a, b, c); }
inline Lanes to_float(IntLanes x) { return _mm256_cvtepi32_ps(x); }

// r = r transposed, a square of 8 × 8 words.
inline void transpose_floats(Lanes (&r)[8]) {
  Lanes a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  // b[4i + j]: column j of each 128-bit lane, of rows 4i … 4i+3.
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
#pragma GCC unroll 8
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm256_permute2f128_ps(b[j], b[4 + j], 0x20);
    r[4 + j] = _mm256_permute2f128_ps(b[j], b[4 + j], 0x31);
  }
}

// The first `count` of 8 elements from data[begin] on, others zero.
inline Lanes load_floats(const void* data, DType dtype, int64_t begin, int64_t count) {
  const char* from = static_cast<const char*>(data) + begin * (dtype == DType::kFloat32 ? 4 : 2);
  alignas(32) char copy[32] = {};
  if (count < 8) {
    std::memcpy(copy, from, static_cast<size_t>(count) * (dtype == DType::kFloat32 ? 4 : 2));
    from = copy;
  }
  if (dtype == DType::kFloat32) return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  if (dtype == DType::kFloat16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

inline Lanes load_bytes(const uint8_t* data, int64_t count) {
  uint64_t bytes = 0;
  std::memcpy(&bytes, data, static_cast<size_t>(std::min<int64_t>(count, 8)));
  const __m128i low = _mm_cvtsi64_si128(static_cast<long long>(bytes));
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(low));
}

// nibbles[word][even, odd][row][4] from `count` words of each row; words to come are fetched.
inline void load_nibbles(const uint32_t* const (&rows)[kPanel], int64_t begin, int64_t count,
                         int64_t ahead, uint8_t* nibbles) {
  const __m256i low = _mm256_set1_epi8(0x0f);
  alignas(32) uint32_t copy[kPanel][kBlockWords];
  const bool partial = count < kBlockWords;
#pragma GCC unroll 8
  for (int i = 0; i < kPanel; ++i) {
    _mm_prefetch(reinterpret_cast<const char*>(rows[i] + begin + ahead), _MM_HINT_T1);
    if (partial) {
      std::memset(copy[i], 0, sizeof(copy[i]));
      std::memcpy(copy[i], rows[i] + begin, static_cast<size_t>(count) * sizeof(uint32_t));
    }
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    __m256 words[kPanel];
#pragma GCC unroll 8
    for (int i = 0; i < kPanel; ++i) {
      const uint32_t* from = partial ? copy[i] : rows[i] + begin;
      words[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(from) + 8 * half);
    }
    transpose_floats(words);
#pragma GCC unroll 8
    for (int t = 0; t < 8; ++t) {
      __m256i* out = reinterpret_cast<__m256i*>(nibbles) + 2 * (8 * half + t);
      const __m256i word = _mm256_castps_si256(words[t]);
      _mm256_store_si256(out, _mm256_and_si256(word, low));
      _mm256_store_si256(out + 1, _mm256_and_si256(_mm256_srli_epi32(word, 4), low));
    }
  }
}

// sums[r] = Σ over words [begin, end) and bytes of (nibbles · digits of row r)
//         + 256 · the same of the digits before, kPlanes - 1 times.
template <int kRows, int kPlanes>
inline void dot(const uint8_t* nibbles, const int32_t* digits, int64_t begin, int64_t end,
                IntLanes (&sums)[kRows]) {
  constexpr int kAtOnce = kRows < 4 ? kRows : 4;  // rows whose sums stay in registers
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 1
  for (int first = 0; first < kRows; first += kAtOnce) {
    __m256i sum[kAtOnce];
#pragma GCC unroll 4
    for (int r = 0; r < kAtOnce; ++r) sum[r] = _mm256_setzero_si256();
#pragma GCC unroll 2
    for (int p = 0; p < kPlanes; ++p) {
#pragma GCC unroll 4
      for (int r = 0; r < kAtOnce; ++r) sum[r] = _mm256_slli_epi32(sum[r], 8);
      const int32_t* x = digits + p * kBlockWords * 2 * kRows + first;
      for (int64_t t = begin; t < end; t += 4) {
        __m256i pairs[kAtOnce];
#pragma GCC unroll 4
        for (int r = 0; r < kAtOnce; ++r) pairs[r] = _mm256_setzero_si256();
        const int64_t stop = std::min(t + 4, end) * 2;
        for (int64_t i = t * 2; i < stop; i += 2) {
#pragma GCC unroll 2
          for (int odd = 0; odd < 2; ++odd) {
            const __m256i weights =
                _mm256_load_si256(reinterpret_cast<const __m256i*>(nibbles) + i + odd);
#pragma GCC unroll 4
            for (int r = 0; r < kAtOnce; ++r) {
              const __m256i values = _mm256_set1_epi32(x[(i + odd) * kRows + r]);
              pairs[r] = _mm256_add_epi16(pairs[r], _mm256_maddubs_epi16(weights, values));
            }
          }
        }
#pragma GCC unroll 4
        for (int r = 0; r < kAtOnce; ++r) {
          sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(pairs[r], ones));
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kAtOnce; ++r) sums[first + r] = sum[r];
  }
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
