// Thirty-two kept bytes with AVX2: vpmaddwd multiplies the bytes in even and in odd places, widened
// to int16, exactly for every int8 value.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr int kBytes = 32;
using IntLanes = __m256i;
using Places = __m256i;

struct Values {
  __m256i even, odd;  // int16
};

inline uint8_t prepare_byte(int8_t q) { return static_cast<uint8_t>(q); }
inline IntLanes zero_lanes() { return _mm256_setzero_si256(); }

// For each kept byte where it lies in its chunk of four groups: 4 · (group mod 4) + place. A byte
// of meta becomes the four bytes of a lane: it is doubled into the upper bytes of two 16-bit
// numbers, of which one keeps the low nibble, p | p' << 2, and one the high one. The upper half of
// a product then is 65 times the nibble, with p in the low byte and p' in the high one.
inline Places load_places(const uint8_t* meta) {
  long long eight;
  std::memcpy(&eight, meta, sizeof(eight));
  const __m256i doubled =
      _mm256_shuffle_epi8(_mm256_set1_epi64x(eight),
                          _mm256_setr_epi32(0x00800080, 0x01800180, 0x02800280, 0x03800380,  //
                                            0x04800480, 0x05800580, 0x06800680, 0x07800780));
  const __m256i nibbles =
      _mm256_and_si256(doubled, _mm256_set1_epi32(static_cast<int>(0xf0000f00)));
  const __m256i spread = _mm256_mulhi_epu16(nibbles, _mm256_set1_epi32(0x04104100));
  const __m256i bases = _mm256_set1_epi64x(0x0c0c080804040000);
  return _mm256_or_si256(_mm256_and_si256(spread, _mm256_set1_epi8(3)), bases);
}

inline Places load_places(const uint8_t* meta, int64_t kept) {
  uint8_t first[kBytes / 4] = {};
  std::memcpy(first, meta, static_cast<size_t>((kept + 3) / 4));
  return load_places(first);
}

inline __m256i pick(const uint8_t* x, Places places) {
  const auto from = [&](const uint8_t* source) {
    return _mm256_shuffle_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)),
                               places);
  };
  return _mm256_blend_epi32(from(x), from(x + kBytes), 0xcc);
}

// Shifts and shuffles share two units, products the two others: the even bytes come of a product
// with ones and zeros.
inline Values widen(__m256i bytes) {
  return {_mm256_maddubs_epi16(_mm256_set1_epi16(0x0001), bytes), _mm256_srai_epi16(bytes, 8)};
}

inline Values load_values(const int8_t* values) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
}

inline Values load_values(const int8_t* values, int64_t count) {
  int8_t first[kBytes] = {};
  std::memcpy(first, values, static_cast<size_t>(count));
  return load_values(first);
}

inline IntLanes add_products(IntLanes acc, __m256i picked, const Values& values) {
  const Values x = widen(picked);
  const __m256i products = _mm256_add_epi32(_mm256_madd_epi16(x.even, values.even),
                                            _mm256_madd_epi16(x.odd, values.odd));
  return _mm256_add_epi32(acc, products);
}

inline IntLanes add_correction(IntLanes acc, const Values& /*values*/) { return acc; }

inline int32_t exact_sum(IntLanes acc, IntLanes /*correction*/) {
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(acc), _mm256_extracti128_si256(acc, 1));
  const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
