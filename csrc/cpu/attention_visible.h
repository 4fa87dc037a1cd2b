// The keys that a query sees, 64 at a time: MaskView::visible() for a row of a block, from the
// ends of its intervals instead of element by element.
#pragma once

#include <cstdint>

#include "common/attention_mask.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

// Keys of a block, one bit each in what follows.
constexpr int32_t kBlockKeys = 64;

// Bits [begin, end) clipped to 64.
inline uint64_t bit_range(int64_t begin, int64_t end) {
  if (begin < 0) begin = 0;
  if (end > kBlockKeys) end = kBlockKeys;
  if (begin >= end) return 0;
  return (~uint64_t{0} >> (kBlockKeys - (end - begin))) << begin;
}

inline uint64_t global_bits(const MaskView& mask, int32_t n0) {
  uint64_t bits = bit_range(0, mask.global_tokens - n0);
  int32_t i = first_not_below(mask.global_index, mask.global_count, n0);
  for (; i < mask.global_count && mask.global_index[i] < n0 + kBlockKeys; ++i) {
    bits |= uint64_t{1} << (mask.global_index[i] - n0);
  }
  return bits;
}

// Bits [first, first + 64) of a row of so many words: set before the row, clear past its end.
inline uint64_t row_bits(const uint32_t* row, int32_t words, int32_t first) {
  if (first <= -kBlockKeys) return ~uint64_t{0};
  if (first < 0) return row_bits(row, words, 0) << -first | bit_range(0, -first);
  const auto word = [&](int32_t w) { return uint64_t{w < words ? row[w] : 0u}; };
  const int32_t w = first / 32, shift = first % 32;
  const uint64_t bits = (word(w) | word(w + 1) << 32) >> shift;
  return shift == 0 ? bits : bits | word(w + 2) << (64 - shift);
}

// Bit j: whether query i sees key n0 + j; n0 is a multiple of kBlockKeys and below k_len.
inline uint64_t visible_keys(const MaskView& mask, int32_t i, int32_t n0) {
  const int64_t p = mask.position(i) - int64_t{n0};
  uint64_t seen = ~uint64_t{0};
  if (mask.windowed() && !mask.is_global(mask.position(i))) {
    const int64_t right = p + mask.window_right + 1;
    const int64_t sinks = mask.sink_tokens - int64_t{n0};
    seen = bit_range(p - mask.window_left, right) | bit_range(0, sinks < right ? sinks : right) |
           global_bits(mask, n0);
  }
  seen &= bit_range(0, (mask.causal && p + 1 < mask.k_len - n0) ? p + 1 : mask.k_len - n0);
  if (mask.bits != nullptr) {
    const uint32_t* words = mask.bits + static_cast<int64_t>(i) * mask.bits_row_words;
    seen &= row_bits(words, mask.bits_row_words, n0 - mask.bits_first);
  }
  return seen;
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
