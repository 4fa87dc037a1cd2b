// How b-bit weights lie in memory: the one layout of the state dict, of every kernel and of
// compressed-tensors' weight_packed.
//
//   qweight  int32 [N, ceil(K·b/32)]. Row n is a little-endian bit stream of unsigned values
//            q[n,k] ∈ [0, 2^b): value k occupies bits [k·b, (k+1)·b) of the stream, and bit i of
//            the stream is bit i mod 32 of word i / 32. Unused bits of the last word are zero.
//   scales   [N, G],  zeros  [N, G] (absent: the middle, 2^(b-1)),  G = ceil(K / group_size)
//   W[n,k] = (q[n,k] - zeros[n,g]) · scales[n,g],  g = k / group_size (or g_idx[k])
//
//   b = 4:  word r = | k=8r+7 | 8r+6 | 8r+5 | 8r+4 | 8r+3 | 8r+2 | 8r+1 | 8r |
//                bit 31     28                                     7..4   3..0
//   b = 8:  word r holds k = 4r … 4r+3, byte by byte.       b = 2: k = 16r … 16r+15.
//   b = 3:  32 values lie in 3 words, and values 10 and 21 of them across two words.
//
// Groups are multiples of 16 values, so that at b = 4 no word belongs to two groups.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/int8_numerics.h"

namespace pumice {

constexpr int64_t kGroupMultiple = 16;

PUMICE_HOST_DEVICE constexpr bool is_intn_width(int64_t bits) {
  return bits == 2 || bits == 3 || bits == 4 || bits == 8;
}

template <int kBits>
struct IntnLayout {
  static_assert(is_intn_width(kBits));
  static constexpr uint32_t kMask = (1u << kBits) - 1u;
  static constexpr int kMiddle = 1 << (kBits - 1);  // the zero point of a symmetric weight
  static constexpr bool kAcrossWords = 32 % kBits != 0;
};

// Words of a row of k values.
PUMICE_HOST_DEVICE constexpr int64_t intn_words(int64_t k, int64_t bits) {
  return (k * bits + 31) / 32;
}

PUMICE_HOST_DEVICE constexpr int64_t intn_groups(int64_t k, int64_t group_size) {
  return group_size < 0 ? 1 : (k + group_size - 1) / group_size;
}

// q[k] of the row beginning at `words`.
template <int kBits>
PUMICE_HOST_DEVICE uint32_t intn_value(const uint32_t* words, int64_t k) {
  using Layout = IntnLayout<kBits>;
  const int64_t bit = k * kBits;
  const int shift = static_cast<int>(bit % 32);
  uint32_t value = words[bit / 32] >> shift;
  if constexpr (Layout::kAcrossWords) {
    if (shift + kBits > 32) value |= words[bit / 32 + 1] << (32 - shift);
  }
  return value & Layout::kMask;
}

// Word `index` of a row of k values q; bits above the width are dropped.
template <int kBits>
PUMICE_HOST_DEVICE uint32_t intn_word(const uint8_t* q, int64_t k, int64_t index) {
  using Layout = IntnLayout<kBits>;
  const int64_t begin = index * 32;
  uint32_t word = 0;
  for (int64_t i = begin / kBits; i * kBits < begin + 32 && i < k; ++i) {
    const int shift = static_cast<int>(i * kBits - begin);  // negative: begun in the word before
    const uint32_t value = q[i] & Layout::kMask;
    word |= shift < 0 ? value >> -shift : value << shift;
  }
  return word;
}

enum class ZeroKind : int32_t {
  kMiddle,   // none given: 2^(b-1)
  kInteger,  // uint8
  kFloat     // in the dtype of the scales
};

// A packed weight; what lies where is in intn_layout.h. Contiguous.
struct IntnWeight {
  const uint32_t* qweight;  // [N, intn_words(K, bits)]
  const void* scales;       // [N, G] of scale_dtype
  const void* zeros;        // [N, G] as zero_kind says
  const int32_t* g_idx;     // [K], or null: g = k / group_size
  DType scale_dtype;
  ZeroKind zero_kind;
  int64_t n, k, groups;
  int64_t group_size;  // positive; K itself for -1
  int bits;
};

// A dense factor [rows, columns], of any floating dtype. A null pointer means absent.
struct MatrixView {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t rows = 0, columns = 0;
};

// function.template operator()<b>() for b = bits, which is_intn_width().
template <typename Function>
auto with_intn_width(int64_t bits, const Function& function) {
  switch (bits) {
    case 2:
      return function.template operator()<2>();
    case 3:
      return function.template operator()<3>();
    case 4:
      return function.template operator()<4>();
    default:
      return function.template operator()<8>();
  }
}

}  // namespace pumice
