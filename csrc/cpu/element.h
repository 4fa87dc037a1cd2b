// float16 and bfloat16 to float and back, rounding to nearest even, in the namespace of the
// instruction set: an inline function shared between files compiled for different instruction sets
// would be kept once by the linker, perhaps in the version this machine cannot run.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "common/dtype.h"

namespace pumice::cpu::PUMICE_ISA {

inline float bfloat16_to_float(uint16_t x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x) << 16);
}

inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // rounding would turn some NaNs into Inf
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#if defined(__F16C__)

inline float float16_to_float(uint16_t x) { return _cvtsh_ss(x); }
inline uint16_t float_to_float16(float x) {
  return static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
}

#else

inline float float16_to_float(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16;
  const uint32_t magnitude = x & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // Inf, NaN (made quiet, as the hardware does)
    const uint32_t quiet = magnitude > 0x7c00u ? 0x400000u : 0u;
    return std::bit_cast<float>(sign | 0x7f800000u | quiet | (magnitude << 13));
  }
  // The exponent bias of 15 becomes 127 by a multiplication, which takes subnormals along.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(scaled));
}

inline uint16_t float_to_float16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // at least 65520, which rounds to infinity
    result = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: the sum's last bit is worth 2^-24
    result = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    result = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return static_cast<uint16_t>(sign | result);
}

#endif

inline float load_element(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return dtype == DType::kFloat16 ? float16_to_float(bits) : bfloat16_to_float(bits);
}

inline void store_element(void* data, DType dtype, int64_t i, float value) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[i] = value;
  } else {
    static_cast<uint16_t*>(data)[i] =
        dtype == DType::kFloat16 ? float_to_float16(value) : float_to_bfloat16(value);
  }
}

// `value` rounded to the precision of dtype.
inline float round_to(DType dtype, float value) {
  if (dtype == DType::kFloat32) return value;
  return dtype == DType::kFloat16 ? float16_to_float(float_to_float16(value))
                                  : bfloat16_to_float(float_to_bfloat16(value));
}

// out[i] = float(data[begin + i])
inline void load_elements(const void* data, DType dtype, int64_t begin, int64_t count, float* out) {
  if (dtype == DType::kFloat32) {
    const float* x = static_cast<const float*>(data) + begin;
    for (int64_t i = 0; i < count; ++i) out[i] = x[i];
    return;
  }
  const uint16_t* x = static_cast<const uint16_t*>(data) + begin;
  if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < count; ++i) out[i] = bfloat16_to_float(x[i]);
    return;
  }
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
  }
#endif
  for (; i < count; ++i) out[i] = float16_to_float(x[i]);
}

// Four floats in a register (on any vector unit).
typedef float Float4 __attribute__((vector_size(16)));
typedef uint32_t UInt4 __attribute__((vector_size(16)));
typedef uint16_t Bits4 __attribute__((vector_size(8)));

inline Bits4 round_four(DType dtype, Float4 value) {
  if (dtype == DType::kBFloat16) {
    const UInt4 bits = std::bit_cast<UInt4>(value);
    const UInt4 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return __builtin_convertvector(value == value ? rounded : UInt4{} + 0x7fc0u, Bits4);
  }
#if defined(__F16C__)
  const __m128i half = _mm_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
  return std::bit_cast<Bits4>(_mm_cvtsi128_si64(half));
#else
  Bits4 half;
  for (int i = 0; i < 4; ++i) half[i] = float_to_float16(value[i]);
  return half;
#endif
}

// data[i, i + count) = the first `count` of four values
inline void store_four(void* data, DType dtype, int64_t i, int count, Float4 value) {
  const auto store = [&](const auto& four, size_t size) {
    char* out = static_cast<char*>(data) + i * size;
    if (count == 4) {
      std::memcpy(out, &four, 4 * size);  // one store: the size is known
    } else {
      std::memcpy(out, &four, static_cast<size_t>(count) * size);
    }
  };
  if (dtype == DType::kFloat32) {
    store(value, sizeof(float));
  } else {
    store(round_four(dtype, value), sizeof(uint16_t));
  }
}

}  // namespace pumice::cpu::PUMICE_ISA
