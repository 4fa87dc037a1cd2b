// W[n,k] = (q[n,k] - zero) · scale in fp32, of any width, group size and kind of zero point.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "common/intn_layout.h"
#include "cpu/element.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

struct GroupParameters {
  float scale, zero;
};

inline GroupParameters group_parameters(const IntnWeight& weight, int64_t n, int64_t group) {
  const int64_t i = n * weight.groups + group;
  const float scale = load_element(weight.scales, weight.scale_dtype, i);
  switch (weight.zero_kind) {
    case ZeroKind::kInteger:
      return {scale, static_cast<float>(static_cast<const uint8_t*>(weight.zeros)[i])};
    case ZeroKind::kFloat:
      return {scale, load_element(weight.zeros, weight.scale_dtype, i)};
    default:
      return {scale, static_cast<float>(1 << (weight.bits - 1))};
  }
}

inline const uint32_t* row_words(const IntnWeight& weight, int64_t n) {
  return weight.qweight + n * intn_words(weight.k, weight.bits);
}

// q[begin, begin + count) of a row, begin a multiple of 8. In memory the bit stream is a stream of
// bytes, and eight values fill a whole number of them: loops that compilers turn into vectors.
template <int kBits>
void unpack_values(const uint32_t* words, int64_t begin, int64_t count, uint8_t* q) {
  static_assert(std::endian::native == std::endian::little);
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(words) + begin / 8 * kBits;
  const int64_t whole = count / 8 * 8;
  if constexpr (kBits == 3) {
    for (int64_t i = 0; i < whole / 8; ++i) {
      const uint32_t eight =
          static_cast<uint32_t>(bytes[3 * i]) | bytes[3 * i + 1] << 8 | bytes[3 * i + 2] << 16;
      for (int j = 0; j < 8; ++j) q[8 * i + j] = eight >> (3 * j) & 7;
    }
  } else {
    constexpr int kInByte = 8 / kBits;
    for (int64_t i = 0; i < whole / kInByte; ++i) {
      for (int j = 0; j < kInByte; ++j) {
        q[kInByte * i + j] = bytes[i] >> (kBits * j) & IntnLayout<kBits>::kMask;
      }
    }
  }
  for (int64_t i = whole; i < count; ++i) {
    q[i] = static_cast<uint8_t>(intn_value<kBits>(words, begin + i));
  }
}

// out[0, K) = W[n, :]
template <int kBits>
void dequantize_row(const IntnWeight& weight, int64_t n, float* out) {
  constexpr int64_t kChunk = 512;
  uint8_t q[kChunk];
  for (int64_t chunk = 0; chunk < weight.k; chunk += kChunk) {
    const int64_t chunk_end = std::min(chunk + kChunk, weight.k);
    unpack_values<kBits>(row_words(weight, n), chunk, chunk_end - chunk, q);
    // Stretches of one group; with g_idx often single elements.
    for (int64_t begin = chunk; begin < chunk_end;) {
      const int64_t group = weight.g_idx ? weight.g_idx[begin] : begin / weight.group_size;
      int64_t end = begin + 1;
      if (weight.g_idx) {
        while (end < chunk_end && weight.g_idx[end] == group) ++end;
      } else {
        end = std::min((group + 1) * weight.group_size, chunk_end);
      }
      const GroupParameters parameters = group_parameters(weight, n, group);
      for (int64_t k = begin; k < end; ++k) {
        out[k] = (static_cast<float>(q[k - chunk]) - parameters.zero) * parameters.scale;
      }
      begin = end;
    }
  }
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
