// Rows as the quantization kernels see them: groups of 8 elements, one group a thread. Eight
// columns are one byte of an outlier mask, which so belongs to one thread: no atomics.
#pragma once

#include "common/int8_numerics.h"
#include "cuda/element.h"
#include "cuda/ptx/load.h"

namespace pumice::cuda {

constexpr int kGroup = 8;
constexpr uint32_t kMagnitude = 0x7fffffffu;
constexpr uint32_t kNaNBits = 0x7fc00000u;
constexpr uint32_t kInfinityBits = 0x7f800000u;

__device__ __forceinline__ bool is_aligned_16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

template <class T>
__device__ __forceinline__ void unpack(const uint4& words, float* v) {
  struct Elements {
    T at[16 / sizeof(T)];
  };
  const auto elements = bits_as<Elements>(words);
#pragma unroll
  for (int i = 0; i < static_cast<int>(16 / sizeof(T)); ++i) v[i] = to_float(elements.at[i]);
}

// The group at `x`, which is 16-byte aligned and has all 8 elements (read from shared memory).
template <class T>
__device__ __forceinline__ void load_whole_group(float (&v)[kGroup], const T* x) {
  constexpr int kPerVector = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < kGroup / kPerVector; ++i) {
    unpack<T>(reinterpret_cast<const uint4*>(x)[i], v + i * kPerVector);
  }
}

// The first `count` elements of the group at `x`, zeros for the others.
template <class T>
__device__ __forceinline__ void load_group(float (&v)[kGroup], const T* x, int64_t count) {
  if (count >= kGroup && is_aligned_16(x)) return load_whole_group(v, x);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) v[i] = i < count ? to_float(x[i]) : 0.0f;
}

__device__ __forceinline__ void apply_smooth(float (&v)[kGroup], const float* smooth,
                                             int64_t count) {
  float s[kGroup];
  load_group(s, smooth, count);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) v[i] *= s[i];
}

// What a group adds to its row's absolute maximum, as bits (magnitudes order like integers, with
// infinity and NaN above all), and which of its elements are outliers.
struct GroupStatistics {
  uint32_t absmax_bits;
  uint32_t outliers;  // bit i: element i
};

__device__ __forceinline__ GroupStatistics examine(const float (&v)[kGroup], float threshold) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) largest = max(largest, __float_as_uint(v[i]) & kMagnitude);
  if (largest < __float_as_uint(threshold)) return {largest, 0};  // two instructions an element
  GroupStatistics found = {0, 0};
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (is_outlier(v[i], threshold)) {
      found.outliers |= 1u << i;
    } else {
      found.absmax_bits = max(found.absmax_bits, __float_as_uint(v[i]) & kMagnitude);
    }
  }
  return found;
}

// Rounds a group; outliers become 0.
__device__ __forceinline__ uint2 round_group(const float (&v)[kGroup], float inverse_scale,
                                             float threshold) {
  uint32_t word[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const int32_t q = is_outlier(v[i], threshold) ? 0 : int8_round(v[i], inverse_scale);
    word[i / 4] |= (static_cast<uint32_t>(q) & 0xff) << (i % 4 * 8);
  }
  return {word[0], word[1]};
}

// The same with a scale that knows nothing of x: clamped, NaN to 0.
__device__ __forceinline__ uint2 clamp_group(const float (&v)[kGroup], float inverse_scale) {
  uint32_t word[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const float scaled = v[i] * inverse_scale;
    // fmaxf(NaN, -127) would be -127.
    const float clamped = scaled != scaled ? 0.0f : fminf(fmaxf(scaled, -kInt8Max), kInt8Max);
    word[i / 4] |= (static_cast<uint32_t>(int8_round(clamped, 1.0f)) & 0xff) << (i % 4 * 8);
  }
  return {word[0], word[1]};
}

// Stores the first `count` bytes of a group.
__device__ __forceinline__ void store_group(int8_t* q, const uint2& word, int64_t count) {
  if (count >= kGroup && reinterpret_cast<uintptr_t>(q) % kGroup == 0) {
    *reinterpret_cast<uint2*>(q) = word;
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const uint32_t half = i < 4 ? word.x : word.y;
    if (i < count) q[i] = static_cast<int8_t>(half >> (i % 4 * 8));
  }
}

}  // namespace pumice::cuda
