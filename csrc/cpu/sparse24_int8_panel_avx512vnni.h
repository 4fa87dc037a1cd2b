// Panels of 16 weight rows with AVX-512 VNNI: eight columns of x are broadcast, a shuffle of bytes
// picks four of them for each weight row, and vpdpbusd multiplies them.
//
// It multiplies unsigned by signed bytes: q + 128 by the weights as they lie. 128 · Σ_j values[n,j]
// is taken off at the end. Sums wrap on the way; the result is exact.
//
// Broadcasts of 8 bytes are loads and no more; those of 16 bytes occupy the unit of the shuffles.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/sparse24_lanes.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

using PanelElement = uint8_t;

constexpr int kTileRows = 8;

struct Step {
  __m512i index, values;
};

inline PanelElement prepare_element(int8_t q) { return static_cast<uint8_t>(q ^ -128); }

// The two places of a group by its nibble; from 16 on, of the second group of a step.
struct PlaceTable {
  alignas(64) uint8_t places[32][2];

  constexpr PlaceTable() : places() {
    for (int i = 0; i < 32; ++i) {
      const int base = i < 16 ? 0 : 4;
      places[i][0] = static_cast<uint8_t>(base + (i & 3));
      places[i][1] = static_cast<uint8_t>(base + (i >> 2 & 3));
    }
  }
};
constexpr PlaceTable kPlaceTable;

// The steps of one word of meta of each row. Half of the word is two steps, four nibbles: it is
// doubled, shifted so that the nibbles of the second groups lie in the upper half, and the bits
// above each nibble tell first from second groups: an index into the table for each 16 bits.
inline void decode(__m512i meta, const __m512i (&values)[kWordSteps], Step* steps) {
  const __m512i table = _mm512_load_si512(kPlaceTable.places);
  const __m512i above = _mm512_set1_epi32(0x10101010), second = _mm512_set1_epi32(0x10100000);
  const __m512i halves[2] = {
      _mm512_set4_epi32(0x0d0c0d0c, 0x09080908, 0x05040504, 0x01000100),
      _mm512_set4_epi32(0x0f0e0f0e, 0x0b0a0b0a, 0x07060706, 0x03020302),
  };
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m512i doubled = _mm512_shuffle_epi8(meta, halves[half]);
    const __m512i shifted = _mm512_srlv_epi16(doubled, _mm512_set1_epi32(4 << 16));
    // (shifted & ~above) | second
    const __m512i index = _mm512_ternarylogic_epi32(shifted, above, second, 0xba);
    steps[2 * half] = {_mm512_permutexvar_epi16(index, table), values[2 * half]};
    steps[2 * half + 1] = {_mm512_permutexvar_epi16(_mm512_srli_epi16(index, 8), table),
                           values[2 * half + 1]};
  }
}

// x: the columns of the step, of rows `stride` apart.
template <int kRows>
inline __attribute__((always_inline)) void add_step(const Step& step, const PanelElement* x,
                                                    int64_t stride, __m512i (&sums)[kRows]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    int64_t columns;
    std::memcpy(&columns, x + r * stride, sizeof(columns));
    const __m512i picked = _mm512_shuffle_epi8(_mm512_set1_epi64(columns), step.index);
    sums[r] = _mm512_dpbusd_epi32(sums[r], picked, step.values);
  }
}

inline __m512i add_correction(__m512i sum, const __m512i (&values)[kWordSteps]) {
  const __m512i ones = _mm512_set1_epi8(1);
#pragma GCC unroll 4
  for (int i = 0; i < kWordSteps; ++i) sum = _mm512_dpbusd_epi32(sum, ones, values[i]);
  return sum;
}

inline __m512i exact_sums(__m512i sums, __m512i correction) {
  return _mm512_sub_epi32(sums, _mm512_slli_epi32(correction, 7));
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
