// Panels of 8 weight rows with AVX2: eight columns of x, as int16, are broadcast, shuffles pick two
// of them for each weight row, and vpmaddwd multiplies those and adds them into int32, exactly for
// every int8 value. First and second kept weights of the two groups of a step go separately: they
// are the even and the odd bytes of a word.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/sparse24_lanes.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

using PanelElement = int16_t;

// As many sums, indices and weights, and what is picked: registers are left for no more.
constexpr int kTileRows = 4;

struct Step {
  struct {
    __m256i index, values;
  } of[2];  // first, second kept weights
};

inline PanelElement prepare_element(int8_t q) { return q; }

// The steps of one word of meta of each row. A byte of it is one step, places p0, p1 of a group and
// p2, p3 of the next. Column p of the first group is the bytes 2p and 2p + 1 of x, p of the second
// 2p + 8 and 2p + 9: the byte of meta is doubled into the upper bytes of two 16-bit numbers, of
// which the places are cut out, p << 10 or p << 14; the upper half of a product then is p · 0x202.
inline void decode(__m256i meta, const __m256i (&values)[kWordSteps], Step* steps) {
  const __m256i places = _mm256_set1_epi32(static_cast<int>(0xc0000c00));
  const __m256i factors = _mm256_set1_epi32(0x08088080);
  const __m256i bases = _mm256_set1_epi32(0x09080100);
  const __m256i of_places[2] = {_mm256_slli_epi32(meta, 2), meta};  // p0 and p2 where p1 and p3 lie
  const __m256i first_byte =
      _mm256_broadcastsi128_si256(_mm_setr_epi32(0x00800080, 0x04800480, 0x08800880, 0x0c800c80));
  // As unsigned bytes: of two the first, of two the second.
  const __m256i parts[2] = {_mm256_set1_epi16(0x0001), _mm256_set1_epi16(0x0100)};
#pragma GCC unroll 4
  for (int i = 0; i < kWordSteps; ++i) {
    const __m256i doubled = _mm256_add_epi32(first_byte, _mm256_set1_epi32(i * 0x01000100));
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m256i cut = _mm256_and_si256(_mm256_shuffle_epi8(of_places[j], doubled), places);
      steps[i].of[j] = {_mm256_or_si256(_mm256_mulhi_epu16(cut, factors), bases),
                        _mm256_maddubs_epi16(parts[j], values[i])};
    }
  }
}

// x: the columns of the step, of rows `stride` apart.
template <int kRows>
inline __attribute__((always_inline)) void add_step(const Step& step, const PanelElement* x,
                                                    int64_t stride, __m256i (&sums)[kRows]) {
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const __m256i columns = _mm256_broadcastsi128_si256(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + r * stride)));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m256i picked = _mm256_shuffle_epi8(columns, step.of[i].index);
      sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(picked, step.of[i].values));
    }
  }
}

inline __m256i add_correction(__m256i sum, const __m256i (& /*values*/)[kWordSteps]) { return sum; }
inline __m256i exact_sums(__m256i sums, __m256i /*correction*/) { return sums; }

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
