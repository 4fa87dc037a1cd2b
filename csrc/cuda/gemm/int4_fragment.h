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

namespace pumice::cuda {

// The bits of 2^e such that an integer or'ed into the last bits of the fraction is added to it:
// 1024 in fp16, 128 in bf16.
template <class T>
constexpr uint32_t kIntegerBase = std::is_same_v<T, __half> ? 0x6400u : 0x4300u;

// (base + zero, base + zero).
template <class T>
__device__ __forceinline__ uint32_t zero_pair(uint32_t zero) {
  return (kIntegerBase<T> | zero) * 0x00010001u;
}

// (nibble i - zero, nibble i + 4 - zero), exactly.
template <class T>
__device__ __forceinline__ uint32_t centred_pair(uint32_t word, int i, uint32_t zeros) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  const uint32_t raised = (word >> (4 * i) & 0x000f000fu) | kIntegerBase<T> * 0x00010001u;
  return bits_as<uint32_t>(__hsub2(bits_as<Pair>(raised), bits_as<Pair>(zeros)));
}

// The operands of two mma from a word of row g and one of row g + 8.
template <class T>
__device__ __forceinline__ void int4_operands(uint32_t first_row, uint32_t second_row,
                                              const uint32_t (&zeros)[2], uint32_t (&a)[2][4]) {
#pragma unroll
  for (int mma = 0; mma < 2; ++mma) {
    a[mma][0] = centred_pair<T>(first_row, 2 * mma, zeros[0]);
    a[mma][1] = centred_pair<T>(second_row, 2 * mma, zeros[1]);
    a[mma][2] = centred_pair<T>(first_row, 2 * mma + 1, zeros[0]);
    a[mma][3] = centred_pair<T>(second_row, 2 * mma + 1, zeros[1]);
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
