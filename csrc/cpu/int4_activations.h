// Activations as digits: x ≈ scale · Σ_p digit[p] · 256^p with signed bytes for digits, one scale
// for each block of kActivationBlock of a row.
//
//   1 digit   int8: scale = absmax / 127, the trade of speed for accuracy that the caller asked for
//   2 digits  for fp16 and bf16: scale is a power of two with |x| / scale < 32640, so that every
//             element down to 2^-3 (fp16) or 2^-6 (bf16) of the block's largest is exact, and the
//             others are wrong by at most 2^-15 of the largest
//   4 digits  for fp32: exact down to 2^-4 of the largest, else within 2^-28 of it
//
// The weight is multiplied by two digits at a time: by a term. `scale` is that of the first, most
// significant term; a second one counts 2^-16 as much.
//
// A block that holds a NaN or an infinity has the scale NaN: its row of y becomes NaN. A block
// below 2^-100 counts as zero (int8_numerics.h).
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "common/int8_numerics.h"
#include "cpu/element.h"
#include "cpu/int4_kernels.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

// out[0, K) = row m of the activations; zeros up to `padded`.
void gather_row(const Int4Activations& x, int64_t m, float* out, int64_t padded) {
  if (x.perm) {
    for (int64_t k = 0; k < x.k; ++k) {
      out[k] = load_element(x.x, x.dtype, m * x.k + x.perm[k]);
      if (x.left_out && x.left_out[x.perm[k]]) out[k] = 0.0f;
    }
  } else {
    load_elements(x.x, x.dtype, m * x.k, x.k, out);
    for (int64_t k = 0; x.left_out && k < x.k; ++k) {
      if (x.left_out[k]) out[k] = 0.0f;
    }
  }
  std::fill(out + x.k, out + padded, 0.0f);
}

struct BlockScale {
  float scale, inverse;
};

inline float power_of_two(int n) {
  return std::bit_cast<float>(static_cast<uint32_t>(n + 127) << 23);
}

inline int exponent_of(float x) {  // a normal number
  return static_cast<int>(std::bit_cast<uint32_t>(x) >> 23) - 127;
}

// Scale of a block; NaN, with inverse 0, where a value is not finite.
template <int kPlanes>
BlockScale block_scale(const float* x) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < kActivationBlock; ++i) {
    bits = std::max(bits, std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu);
  }
  const float absmax = std::bit_cast<float>(bits);
  if (bits >= 0x7f800000u) return {std::numeric_limits<float>::quiet_NaN(), 0.0f};
  if (absmax < kTinyAbsmax) return {0.0f, 0.0f};
  if constexpr (kPlanes == 1) return {int8_scale(absmax), int8_inverse_scale(absmax)};
  const int e = exponent_of(absmax);
  if constexpr (kPlanes == 2) {
    // 15 bits; one less where the greatest would need a third signed byte.
    const int exponent = absmax * power_of_two(14 - e) > 32639.0f ? 13 : 14;
    return {power_of_two(e - exponent), power_of_two(exponent - e)};
  }
  // 28 bits: more, and the inverse of the smallest scale would not be finite.
  return {power_of_two(e - 27 + 16), power_of_two(27 - e)};
}

// q = round(x · inverse), half to even; zeros where inverse is 0, whatever x.
inline void round_block(const float* x, float inverse, int32_t* q) {
  for (int64_t i = 0; i < kActivationBlock; ++i) {
    q[i] = inverse == 0.0f ? 0 : static_cast<int32_t>(std::rint(x[i] * inverse));
  }
}

// Where a product wants the digits of a row, four to an int32: the most significant first, then by
// word, then those of the word's even k and its odd k (low and high nibbles).
struct DigitStrides {
  int64_t plane, word, odd;
};

// The even bytes of eight, as four.
inline int32_t even_bytes(uint64_t bytes) {
  bytes &= 0x00ff00ff00ff00ffu;
  bytes = (bytes | bytes >> 8) & 0x0000ffff0000ffffu;
  return static_cast<int32_t>(bytes | bytes >> 16);
}

// Plain loops, one thing each: they become vector instructions.
template <int kPlanes>
void store_digits(const int32_t* q, const DigitStrides& strides, int32_t* digits) {
  int32_t rest[kActivationBlock];
  std::copy_n(q, kActivationBlock, rest);
  for (int p = kPlanes - 1; p >= 0; --p) {
    int8_t bytes[kActivationBlock];
    for (int64_t i = 0; i < kActivationBlock; ++i) bytes[i] = static_cast<int8_t>(rest[i]);
    for (int64_t i = 0; p > 0 && i < kActivationBlock; ++i) rest[i] = (rest[i] - bytes[i]) >> 8;
    uint64_t words[kBlockWords];
    std::memcpy(words, bytes, sizeof(words));
    int32_t even[kBlockWords], odd[kBlockWords];
    for (int64_t word = 0; word < kBlockWords; ++word) {
      even[word] = even_bytes(words[word]);
      odd[word] = even_bytes(words[word] >> 8);
    }
    int32_t* plane = digits + p * strides.plane;
    for (int64_t word = 0; word < kBlockWords; ++word, plane += strides.word) {
      plane[0] = even[word];
      plane[strides.odd] = odd[word];
    }
  }
}

// For each term of an activation the sum over a segment, which its zero point multiplies. Exact.
struct TermSums {
  float high, low;
};

template <int kPlanes>
TermSums sum_segment(const int32_t* q, const Int4Segment& segment) {
  int32_t high = 0, low = 0;
  for (int64_t i = segment.begin * 8; i < segment.end * 8; ++i) {
    if constexpr (kPlanes <= 2) {
      high += q[i];
    } else {
      // The value of the two lower signed digits, -32896 … 32639, and what is left.
      const int32_t rest = ((q[i] + 128 + 32768) & 0xffff) - 128 - 32768;
      low += rest;
      high += (q[i] - rest) >> 16;
    }
  }
  return {static_cast<float>(high), static_cast<float>(low)};
}

// Digits of row m, and for each segment store(segment, scale, sums).
template <int kPlanes, typename Store>
void prepare_row(const Int4DigitJob& job, int64_t m, float* values, const DigitStrides& strides,
                 int64_t block_stride, int32_t* digits, const Store& store) {
  alignas(64) int32_t q[kActivationBlock];
  gather_row(job.x, m, values, job.blocks * kActivationBlock);
  for (int64_t block = 0; block < job.blocks; ++block) {
    const float* x = values + block * kActivationBlock;
    const BlockScale scale = block_scale<kPlanes>(x);
    round_block(x, scale.inverse, q);
    store_digits<kPlanes>(q, strides, digits + block * block_stride);
    for (int64_t s = job.block_segments[block]; s < job.block_segments[block + 1]; ++s) {
      store(s, scale.scale, sum_segment<kPlanes>(q, job.segments[s]));
    }
  }
}

// f.template operator()<planes>()
template <typename F>
void with_planes(int planes, const F& f) {
  if (planes == 1) return f.template operator()<1>();
  if (planes == 2) return f.template operator()<2>();
  return f.template operator()<4>();
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
