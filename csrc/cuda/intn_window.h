// Eight neighbouring b-bit weights at a time (common/intn_layout.h), for any b.
#pragma once

#include "common/intn_layout.h"
#include "cuda/element.h"

namespace pumice::cuda {

constexpr int kWindowValues = 8;

// The bits of values 8u .. 8u+7 of a row of `row_words` words: 8·b ≤ 64 of them, from bit 0 on. At
// b = 3 they begin at bit 0, 8, 16 or 24 of a word and may go on in the next; beyond the last word
// of the row they are zero.
__device__ __forceinline__ uint64_t intn_window(const uint32_t* row, int64_t row_words, int64_t u,
                                                int bits) {
  const int64_t bit = u * kWindowValues * bits;
  const int64_t word = bit / 32;
  const int shift = static_cast<int>(bit % 32);
  uint64_t window = row[word];
  if (shift + kWindowValues * bits > 32 && word + 1 < row_words) {
    window |= static_cast<uint64_t>(row[word + 1]) << 32;
  }
  return window >> shift;
}

__device__ __forceinline__ uint32_t window_value(uint64_t window, int i, int bits) {
  return static_cast<uint32_t>(window >> (i * bits)) & ((1u << bits) - 1u);
}

struct GroupTerms {
  float scale, zero;
};

// The scale and zero point of row n and a group, as fp32.
__device__ __forceinline__ GroupTerms group_terms(const IntnWeight& weight, int64_t n, int group) {
  const int64_t i = n * weight.groups + group;
  const float scale = element_or_zero({weight.scales, weight.scale_dtype}, i);
  switch (weight.zero_kind) {
    case ZeroKind::kInteger:
      return {scale, static_cast<float>(static_cast<const uint8_t*>(weight.zeros)[i])};
    case ZeroKind::kFloat:
      return {scale, element_or_zero({weight.zeros, weight.scale_dtype}, i)};
    default:
      return {scale, static_cast<float>(1 << (weight.bits - 1))};
  }
}

// W[n, 8u .. 8u+7] in fp32, each with one rounding after the exact q - zero (or two, where the zero
// point is fractional). Values beyond K are unspecified, but finite if the scales are.
__device__ __forceinline__ void dequantize_window(const IntnWeight& weight, int64_t n, int64_t u,
                                                  float (&w)[kWindowValues]) {
  const int64_t row_words = intn_words(weight.k, weight.bits);
  const uint64_t window = intn_window(weight.qweight + n * row_words, row_words, u, weight.bits);
  const int64_t k0 = u * kWindowValues;
  if (weight.g_idx == nullptr) {
    // Groups are multiples of 16: a window lies in one.
    const int group =
        static_cast<int>(static_cast<uint32_t>(k0) / static_cast<uint32_t>(weight.group_size));
    const GroupTerms terms = group_terms(weight, n, group);
#pragma unroll
    for (int i = 0; i < kWindowValues; ++i) {
      const float q = static_cast<float>(window_value(window, i, weight.bits));
      w[i] = __fmul_rn(__fsub_rn(q, terms.zero), terms.scale);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWindowValues; ++i) {
      const GroupTerms terms = group_terms(weight, n, weight.g_idx[min(k0 + i, weight.k - 1)]);
      const float q = static_cast<float>(window_value(window, i, weight.bits));
      w[i] = __fmul_rn(__fsub_rn(q, terms.zero), terms.scale);
    }
  }
}

}  // namespace pumice::cuda
