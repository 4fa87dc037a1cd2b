// 16-bit operands of the tensor cores from fp32 numbers, and the product of the type.
#pragma once

#include <type_traits>

#include "cuda/device.h"
#include "cuda/ptx/mma.h"

namespace pumice::cuda {

// The 16-bit type that T is multiplied in; fp32 as the sum of two bf16, which keeps 16 bits of its
// fraction and its range.
template <class T>
using Multiplicand = std::conditional_t<std::is_same_v<T, __half>, __half, __nv_bfloat16>;

template <class T>
constexpr bool kIsSplit = std::is_same_v<T, float>;

template <class T>
__device__ __forceinline__ uint32_t bits_of(float x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half_as_ushort(__float2half_rn(x));
  } else {
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
  }
}

// x = high + low. high is x cut off, not rounded: it cannot overflow, and the difference is exact.
// An infinity has no low part (∞ - ∞), nor has NaN.
struct SplitBits {
  uint32_t high, low;
};
__device__ __forceinline__ SplitBits split_bits(float x) {
  const uint32_t bits = __float_as_uint(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  if (!finite) return {x != x ? 0x7fc0u : bits >> 16, 0};
  const float rest = x - __uint_as_float(bits & 0xffff0000u);
  return {bits >> 16, bits_of<__nv_bfloat16>(rest)};
}

// mma.sync m16n8k16 of operands of the 16-bit type of T.
template <class T>
__device__ __forceinline__ void mma_16bit(float (&d)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>) {
    ptx::mma_m16n8k16_f16(d, a, b);
  } else {
    ptx::mma_m16n8k16_bf16(d, a, b);
  }
}

}  // namespace pumice::cuda
