// Sixty-four kept bytes with AVX-512 VNNI.
//
// vpdpbusd multiplies unsigned by signed bytes: q + 128, of which the kept elements are picked, by
// the weights as they lie. 128 · Σ_j values[n,j], which one more vpdpbusd for each register of
// weights sums, is taken off at the end. Sums wrap on the way; the result is exact.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr int kBytes = 64;
using IntLanes = __m512i;
using Places = __m512i;
using Values = __m512i;

inline uint8_t prepare_byte(int8_t q) { return static_cast<uint8_t>(q ^ -128); }
inline IntLanes zero_lanes() { return _mm512_setzero_si512(); }

// For each kept byte where it lies in its chunk of four groups: 4 · (group mod 4) + place. A byte
// of meta becomes the four bytes of a lane.
inline Places places_of(__m128i meta) {
  const __m512i bases = _mm512_set1_epi64(0x0c0c080804040000);
  const __m512i place = _mm512_set1_epi8(3);
  const __m512i four = _mm512_cvtepu8_epi32(meta);
  const __m512i pairs = _mm512_or_si512(four, _mm512_slli_epi32(four, 12));
  const __m512i spread = _mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 6));
  return _mm512_ternarylogic_epi32(spread, place, bases, 0xea);  // (spread & place) | bases
}

inline Places load_places(const uint8_t* meta) {
  return places_of(_mm_loadu_si128(reinterpret_cast<const __m128i*>(meta)));
}

inline Places load_places(const uint8_t* meta, int64_t kept) {
  const __mmask16 mask = static_cast<__mmask16>((1u << ((kept + 3) / 4)) - 1u);
  return places_of(_mm_maskz_loadu_epi8(mask, meta));
}

inline __m512i pick(const uint8_t* x, Places places) {
  const __m512i first = _mm512_shuffle_epi8(_mm512_loadu_si512(x), places);
  return _mm512_mask_shuffle_epi8(first, 0xff00ff00ff00ff00, _mm512_loadu_si512(x + kBytes),
                                  places);
}

inline Values load_values(const int8_t* values) { return _mm512_loadu_si512(values); }

inline Values load_values(const int8_t* values, int64_t count) {
  return _mm512_maskz_loadu_epi8((uint64_t{1} << count) - 1, values);
}

inline IntLanes add_products(IntLanes acc, __m512i picked, Values values) {
  return _mm512_dpbusd_epi32(acc, picked, values);
}

inline IntLanes add_correction(IntLanes acc, Values values) {
  return _mm512_dpbusd_epi32(acc, _mm512_set1_epi8(1), values);
}

inline int32_t exact_sum(IntLanes acc, IntLanes correction) {
  return _mm512_reduce_add_epi32(_mm512_sub_epi32(acc, _mm512_slli_epi32(correction, 7)));
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
