// Groups of sixteen weight rows with AVX-512; of bf16 pairs with AVX512-BF16.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace pumice::cpu::PUMICE_ISA {
namespace {

using Lanes = __m512;

inline Lanes zero_lanes() { return _mm512_setzero_ps(); }
inline Lanes add(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
inline Lanes load_lanes(const float* p) { return _mm512_loadu_ps(p); }

// The kept pairs of 16-bit elements in the lanes of a register, the first or the second, in fp32.
template <DType kDtype>
inline Lanes kept_of(RowWords pairs, int which) {
  if constexpr (kDtype == DType::kBFloat16) {
    return _mm512_castsi512_ps(which ? _mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000))
                                     : _mm512_slli_epi32(pairs, 16));
  } else {
    const RowWords half = which ? _mm512_srli_epi32(pairs, 16) : pairs;
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(half));
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
    places[0] = _mm512_srli_epi32(meta, static_cast<unsigned>(4 * g));
    places[1] = _mm512_srli_epi32(meta, static_cast<unsigned>(4 * g + 2));
  }
  template <DType kDtype>
  void set_kept(RowWords pairs) {
    kept[0] = kept_of<kDtype>(pairs, 0);
    kept[1] = kept_of<kDtype>(pairs, 1);
  }
  void set_kept(RowWords first, RowWords second) {
    kept[0] = _mm512_castsi512_ps(first);
    kept[1] = _mm512_castsi512_ps(second);
  }
  static Lanes broadcast(const float* four) { return _mm512_broadcast_f32x4(_mm_loadu_ps(four)); }
  static Lanes multiply_add(Lanes x, RowWords places, Lanes kept, Lanes sum) {
    return _mm512_fmadd_ps(_mm512_permutevar_ps(x, places), kept, sum);
  }
};

#if defined(__AVX512BF16__)

// Of each nibble, where the bytes of the two kept elements lie in a group's eight.
struct PairShuffles {
  alignas(64) uint32_t bytes[16];

  constexpr PairShuffles() : bytes() {
    for (uint32_t nibble = 0; nibble < 16; ++nibble) {
      const uint32_t first = 2 * (nibble & 3), second = 2 * (nibble >> 2);
      bytes[nibble] = first | (first + 1) << 8 | second << 16 | (second + 1) << 24;
    }
  }
};
constexpr PairShuffles kPairShuffles;

// A lane of vpdpbf16ps multiplies two pairs: of elements of x, and of kept weights as they lie in
// memory. It rounds each addition to nearest and takes denormal numbers as 0.
struct PairGroup {
  using Element = uint16_t;
  static constexpr int kSteps = 1;
  RowWords places[kSteps];
  Lanes kept[kSteps];

  // vpermd looks at the four lowest bits of a lane.
  void set_places(RowWords meta, int g) {
    places[0] = _mm512_permutexvar_epi32(_mm512_srli_epi32(meta, static_cast<unsigned>(4 * g)),
                                         _mm512_load_si512(kPairShuffles.bytes));
  }
  template <DType kDtype>
  void set_kept(RowWords pairs) {
    kept[0] = _mm512_castsi512_ps(pairs);
  }
  static Lanes broadcast(const uint16_t* four) {
    int64_t bits;
    __builtin_memcpy(&bits, four, sizeof(bits));
    return _mm512_castsi512_ps(_mm512_set1_epi64(bits));
  }
  static Lanes multiply_add(Lanes x, RowWords places, Lanes kept, Lanes sum) {
    const __m512i picked = _mm512_shuffle_epi8(_mm512_castps_si512(x), places);
    return _mm512_dpbf16_ps(sum, (__m512bh)picked, (__m512bh)kept);
  }
};

template <DType kDtype>
using GroupOf = std::conditional_t<kDtype == DType::kBFloat16, PairGroup, FloatGroup>;

#else

template <DType kDtype>
using GroupOf = FloatGroup;

#endif

// Sums of 8 × 2 or 4 × 4 registers. The broadcast of 16 bytes takes a port that multiplies, that of
// 8 none: four panels share one.
template <typename Group>
constexpr int kTileRows = Group::kSteps == 1 ? 8 : 4;
template <typename Group>
constexpr int kPanels = Group::kSteps == 1 ? 2 : 4;
// 16 KB
template <typename Group>
constexpr int64_t kBlockGroups = Group::kSteps == 1 ? 64 : 16;

// Measured: the kernels for few rows convert 16-bit weights once for each four of them.
template <typename Group, DType kDtype>
constexpr int64_t kFewRows = Group::kSteps == 1          ? 2
                             : kDtype == DType::kFloat32 ? 12
                                                         : 6;

// Lanes of y at out[0 … count), rounded to nearest even.
template <DType kDtype>
inline void store_lanes(void* y, int64_t i, int count, Lanes sums) {
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1u);
  if constexpr (kDtype == DType::kFloat32) {
    _mm512_mask_storeu_ps(static_cast<float*>(y) + i, mask, sums);
  } else {
    __m256i half;
    if constexpr (kDtype == DType::kFloat16) {
      half = _mm512_cvtps_ph(sums, _MM_FROUND_TO_NEAREST_INT);
    } else {
      const __m512i bits = _mm512_castps_si512(sums);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      const __m512i up = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
      const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, up), 16);
      const __mmask16 nan = _mm512_cmp_ps_mask(sums, sums, _CMP_UNORD_Q);
      half = _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
    }
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + i, mask, half);
  }
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
