// A operands of the tensor cores from packed weights.
//
// A lane has words of 8 values of K, of its rows g and g + 8 of a tile of 16. Nibbles i and i + 4
// of a word lie 16 bits apart: one `and` gives both as the low bits of two 16-bit numbers. As a sum
// does not mind its order, these are the neighbours along K of an mma; x is paired alike:
//
//   first mma   a: (k0,k4) (k1,k5)      second mma   a: (k2,k6) (k3,k7)
#pragma once

#include <type_traits>

#include "cuda/element.h"
#include "cuda/gemm/float_fragment.h"
#include "cuda/intn_window.h"
#include "cuda/ptx/lop3.h"

namespace pumice::cuda {

// Bits 0x6400 | q are 1024 + q in fp16, 0x4300 | q are 128 + q in bf16: an integer becomes a float
// number by an `or`, and a subtraction of two such numbers is exact.
template <class T>
constexpr uint32_t kIntegerBase = std::is_same_v<T, __half> ? 0x6400u : 0x4300u;

// What is subtracted from the raised values of a row: a pair of base + zero. fp16 has room for a
// value at bits 4-7, too, where it counts 16 times as much: 1024 + 16·q. Divided by 16 and without
// 64 + zero (bits 0x5400 | zero << 4) that is q - zero as well, in one fused operation, and needs
// one shift a word instead of three.
struct ZeroPairs {
  uint32_t low, high;
};
template <class T>
__device__ __forceinline__ ZeroPairs zero_pairs(uint32_t zero) {
  return {zero * 0x00010001u + kIntegerBase<T> * 0x00010001u, zero * 0x00100010u + 0x54005400u};
}

// (nibble i - zero, nibble i + 4 - zero) for i = 0 .. 3, exactly.
__device__ __forceinline__ void centred_pairs(uint32_t word, const ZeroPairs& zeros,
                                              uint32_t (&pairs)[4], __half) {
  const __half2 sixteenth = __float2half2_rn(0.0625f);
  const __half2 low = bits_as<__half2>(zeros.low);
  const __half2 high = bits_as<__half2>(zeros.high);
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t shifted = word >> (4 * i);
    const auto first = bits_as<__half2>(ptx::and_or(shifted, 0x000f000fu, 0x64006400u));
    const auto second = bits_as<__half2>(ptx::and_or(shifted, 0x00f000f0u, 0x64006400u));
    pairs[i] = bits_as<uint32_t>(__hsub2(first, low));
    pairs[i + 1] = bits_as<uint32_t>(__hsub2(__hmul2(second, sixteenth), high));
  }
}
__device__ __forceinline__ void centred_pairs(uint32_t word, const ZeroPairs& zeros,
                                              uint32_t (&pairs)[4], __nv_bfloat16) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t raised = ptx::and_or(word >> (4 * i), 0x000f000fu, 0x43004300u);
    pairs[i] = bits_as<uint32_t>(
        __hsub2(bits_as<__nv_bfloat162>(raised), bits_as<__nv_bfloat162>(zeros.low)));
  }
}

// The operands of two mma from a word of row g and one of row g + 8.
template <class T>
__device__ __forceinline__ void int4_operands(uint32_t first_row, uint32_t second_row,
                                              const ZeroPairs& first_zeros,
                                              const ZeroPairs& second_zeros, uint32_t (&a)[2][4]) {
  uint32_t first[4], second[4];
  centred_pairs(first_row, first_zeros, first, T{});
  centred_pairs(second_row, second_zeros, second, T{});
#pragma unroll
  for (int mma = 0; mma < 2; ++mma) {
    a[mma][0] = first[2 * mma];
    a[mma][1] = second[2 * mma];
    a[mma][2] = first[2 * mma + 1];
    a[mma][3] = second[2 * mma + 1];
  }
}

// The same of 8 dequantized values of each row: rounded, and what the rounding left (kSplit).
template <class T, bool kSplit>
__device__ __forceinline__ void dequantized_operands(const float (&first_row)[kWindowValues],
                                                     const float (&second_row)[kWindowValues],
                                                     uint32_t (&a)[2][4], uint32_t (&low)[2][4]) {
  const auto pair = [](float first, float second, uint32_t& high, uint32_t& rest) {
    if constexpr (kSplit) {
      const SplitBits p = split_bits(first), q = split_bits(second);
      high = p.high | q.high << 16;
      rest = p.low | q.low << 16;
    } else {
      high = bits_of<T>(first) | bits_of<T>(second) << 16;
    }
  };
#pragma unroll
  for (int mma = 0; mma < 2; ++mma) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = 2 * mma + half;
      pair(first_row[i], first_row[i + 4], a[mma][2 * half], low[mma][2 * half]);
      pair(second_row[i], second_row[i + 4], a[mma][2 * half + 1], low[mma][2 * half + 1]);
    }
  }
}

// B operands of the two mma from 8 neighbours of a token.
__device__ __forceinline__ void token_operands(const uint4& x, uint32_t (&b)[2][2]) {
  constexpr uint32_t kLowHalves = 0x5410, kHighHalves = 0x7632;
  b[0][0] = __byte_perm(x.x, x.z, kLowHalves);   // k0, k4
  b[0][1] = __byte_perm(x.x, x.z, kHighHalves);  // k1, k5
  b[1][0] = __byte_perm(x.y, x.w, kLowHalves);   // k2, k6
  b[1][1] = __byte_perm(x.y, x.w, kHighHalves);  // k3, k7
}

}  // namespace pumice::cuda
