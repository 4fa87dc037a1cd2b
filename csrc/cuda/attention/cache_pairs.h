// Bytes of a cache, four in a register, as pairs of 16-bit operands of the tensor cores, exactly:
// float8 e4m3 and int8 have fewer bits than fp16 and bf16 keep. What a byte stands for, stored ·
// scale, is left to the softmax's scale and to the end of a row.
//
// The pairs are (b0, b2) and (b1, b3): bytes two apart already lie in different halves, so that a
// mask takes the place of a permutation. cache_tile.h says which columns those are.
#pragma once

#include "common/paged_cache.h"
#include "cuda/element.h"
#include "cuda/ptx/cvt_e4m3.h"
#include "cuda/ptx/lop3.h"

namespace pumice::cuda {

struct BytePairs {
  uint32_t even, odd;  // bytes 0 and 2, 1 and 3
};

// The fp16 of bytes 1 and 3 of a word of float8, for GPUs without the instruction (before sm_89).
// With its exponent in place of fp16's a byte is worth 2^-8 of itself, and NaN some 1.9 instead:
// its magnitude alone carries into the exponent's highest bit.
__device__ __forceinline__ uint32_t odd_float8_by_bits(uint32_t word) {
  const uint32_t magnitude = word >> 1 & 0x3f803f80u;
  const uint32_t nan = (magnitude + 0x00800080u) & 0x40004000u;
  const uint32_t scaled = (word & 0x80008000u) | magnitude | nan;
  const auto factor = bits_as<__half2>(0x5c005c00u);  // 2^8
  return bits_as<uint32_t>(__hmul2(bits_as<__half2>(scaled), factor));
}

__device__ __forceinline__ BytePairs float8_to_fp16(uint32_t word) {
#if !defined(PUMICE_EMULATED) && __CUDA_ARCH__ >= 890
  const uint32_t sorted = __byte_perm(word, 0, 0x3120);
  return {ptx::e4m3x2_to_f16x2(sorted), ptx::e4m3x2_to_f16x2(sorted >> 16)};
#else
  return {odd_float8_by_bits(word << 8), odd_float8_by_bits(word)};
#endif
}

__device__ __forceinline__ uint32_t fp16_to_bf16(uint32_t pair) {
  const float2 both = __half22float2(bits_as<__half2>(pair));
  return bits_as<uint32_t>(__floats2bfloat162_rn(both.x, both.y));
}

// fp16 1024 + u, where u is the byte with its first bit turned over, 128 too much.
__device__ __forceinline__ BytePairs int8_to_fp16(uint32_t word) {
  const uint32_t biased = word ^ 0x80808080u;
  const auto bias = bits_as<__half2>(0x64806480u);
  const auto minus_bias = [&](uint32_t bytes) {
    const uint32_t raised = ptx::and_or(bytes, 0x00ff00ffu, 0x64006400u);
    return bits_as<uint32_t>(__hsub2(bits_as<__half2>(raised), bias));
  };
  return {minus_bias(biased), minus_bias(biased >> 8)};
}

// bf16 128 + (the lower seven bits), less 128, or 256 where the first bit is set.
__device__ __forceinline__ BytePairs int8_to_bf16(uint32_t word) {
  const auto of = [](uint32_t bytes) {
    const uint32_t raised = ptx::and_or(bytes, 0x007f007fu, 0x43004300u);
    const uint32_t bias = ptx::and_or(bytes, 0x00800080u, 0x43004300u);
    return bits_as<uint32_t>(
        __hsub2(bits_as<__nv_bfloat162>(raised), bits_as<__nv_bfloat162>(bias)));
  };
  return {of(word), of(word >> 8)};
}

template <class T, CacheType kType>
__device__ __forceinline__ BytePairs widen_bytes(uint32_t word) {
  constexpr bool kFp16 = std::is_same_v<T, __half>;
  if constexpr (kType == CacheType::kInt8) {
    return kFp16 ? int8_to_fp16(word) : int8_to_bf16(word);
  } else {
    const BytePairs halves = float8_to_fp16(word);
    if constexpr (kFp16) return halves;
    return {fp16_to_bf16(halves.even), fp16_to_bf16(halves.odd)};
  }
}

// One byte as fp32.
template <CacheType kType>
__device__ __forceinline__ float widen_byte(uint8_t byte) {
  if constexpr (kType == CacheType::kInt8) return static_cast<float>(static_cast<int8_t>(byte));
  return to_float(bits_as<__half>(static_cast<uint16_t>(ptx::e4m3x2_to_f16x2(byte))));
}

// Which bytes of a word are NaN, as their highest bits. int8 has none.
__device__ __forceinline__ uint32_t float8_nan_bits(uint32_t word) {
  return ((word & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
}

}  // namespace pumice::cuda
