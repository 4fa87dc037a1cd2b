// int8 to fp16 and bf16, exactly, four at a time and without a conversion instruction.
#pragma once

#include <type_traits>

#include "cuda/element.h"

namespace pumice::cuda {

// 1024 + u, for a byte u, is the fp16 number with the bits 0x6400 | u. With u = w + 128, which
// flips the top bit of the byte: w = (1024 + u) - 1152.
__device__ __forceinline__ void widen_int8x4(uint32_t bytes, __half2& low, __half2& high) {
  const uint32_t biased = bytes ^ 0x80808080u;
  const __half2 bias = __float2half2_rn(1152.0f);
  low = __hsub2(bits_as<__half2>(__byte_perm(biased, 0x64646464u, 0x4140)), bias);
  high = __hsub2(bits_as<__half2>(__byte_perm(biased, 0x64646464u, 0x4342)), bias);
}

// bf16 has 7 bits of fraction, one too few for that. 0x4300 | u is 128 + u for u < 128, and 0x4380
// is 256, so with the top bit of w on its own: w = (128 + low seven bits) - (128 or 256).
__device__ __forceinline__ __nv_bfloat162 widen_pair(uint32_t word) {
  const auto magnitude = bits_as<__nv_bfloat162>(word & 0xff7fff7fu);
  const auto sign = bits_as<__nv_bfloat162>(word & 0xff80ff80u);
  return __hsub2(magnitude, sign);
}

__device__ __forceinline__ void widen_int8x4(uint32_t bytes, __nv_bfloat162& low,
                                             __nv_bfloat162& high) {
  low = widen_pair(__byte_perm(bytes, 0x43434343u, 0x4140));
  high = widen_pair(__byte_perm(bytes, 0x43434343u, 0x4342));
}

// The same as the two registers of an mma fragment. T: __half or __nv_bfloat16.
template <class T>
__device__ __forceinline__ void widen_int8x4(uint32_t bytes, uint32_t& low, uint32_t& high) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  Pair pair[2];
  widen_int8x4(bytes, pair[0], pair[1]);
  low = bits_as<uint32_t>(pair[0]);
  high = bits_as<uint32_t>(pair[1]);
}

}  // namespace pumice::cuda
