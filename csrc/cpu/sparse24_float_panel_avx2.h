// Groups of eight weight rows with AVX2.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace pumice::cpu::PUMICE_ISA {
namespace {

using Lanes = __m256;

inline Lanes zero_lanes() { return _mm256_setzero_ps(); }
inline Lanes add(Lanes a, Lanes b) { return _mm256_add_ps(a, b); }
inline Lanes load_lanes(const float* p) { return _mm256_loadu_ps(p); }

// The lower halves of eight words.
inline __m128i low_halves(__m256i words) {
  const __m256i low = _mm256_and_si256(words, _mm256_set1_epi32(0xffff));
  return _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
}

// The kept pairs of 16-bit elements in the lanes of a register, the first or the second, in fp32.
template <DType kDtype>
inline Lanes kept_of(RowWords pairs, int which) {
  if constexpr (kDtype == DType::kBFloat16) {
    return _mm256_castsi256_ps(which ? _mm256_and_si256(pairs, _mm256_set1_epi32(-0x10000))
                                     : _mm256_slli_epi32(pairs, 16));
  } else {
    return _mm256_cvtph_ps(low_halves(which ? _mm256_srli_epi32(pairs, 16) : pairs));
  }
}

// vpermilps picks by the two lowest bits of a lane, and does not look at others.
struct FloatGroup {
  using Element = float;
  static constexpr int kSteps = 2;  // the first kept weights, then the second
  RowWords places[kSteps];
  Lanes kept[kSteps];

  // Group g of the words of meta.
  void set_places(RowWords meta, int g) {
    places[0] = _mm256_srli_epi32(meta, 4 * g);
    places[1] = _mm256_srli_epi32(meta, 4 * g + 2);
  }
  template <DType kDtype>
  void set_kept(RowWords pairs) {
    kept[0] = kept_of<kDtype>(pairs, 0);
    kept[1] = kept_of<kDtype>(pairs, 1);
  }
  void set_kept(RowWords first, RowWords second) {
    kept[0] = _mm256_castsi256_ps(first);
    kept[1] = _mm256_castsi256_ps(second);
  }
  static Lanes broadcast(const float* four) {
    return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(four));
  }
  static Lanes multiply_add(Lanes x, RowWords places, Lanes kept, Lanes sum) {
    return _mm256_fmadd_ps(_mm256_permutevar_ps(x, places), kept, sum);
  }
};

template <DType kDtype>
using GroupOf = FloatGroup;

// Of sixteen registers, sums take eight.
template <typename Group>
constexpr int kTileRows = 8;
template <typename Group>
constexpr int kPanels = 1;
// 16 KB
template <typename Group>
constexpr int64_t kBlockGroups = 128;

// Measured.
template <typename Group, DType kDtype>
constexpr int64_t kFewRows = 4;

// Lanes of y at out[0 … count), rounded to nearest even.
template <DType kDtype>
inline void store_lanes(void* y, int64_t i, int count, Lanes sums) {
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, sums);
  for (int j = 0; j < count; j += 4) {
    Float4 four;
    std::memcpy(&four, lanes + j, sizeof(four));
    store_four(y, kDtype, i + j, std::min(4, count - j), four);
  }
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
