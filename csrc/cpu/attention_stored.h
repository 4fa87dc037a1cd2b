// Registers of floats from numbers as tensors and caches store them, and back: what lies in memory
// is converted on its way to a multiplication, and no copy of it made.
#pragma once

#include "cpu/attention_vector.h"
#include "cpu/cache_element.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

// Each load() is kLanes numbers x, and returns x / kScale.
struct StoredFloat32 {
  using Element = float;
  static constexpr float kScale = 1.0f;
  static PUMICE_VECTOR Vec load(const float* x) { return PUMICE_ISA::load(x); }
};

struct StoredBFloat16 {
  using Element = uint16_t;
  static constexpr float kScale = 1.0f;
  static PUMICE_VECTOR Vec load(const uint16_t* x);
};

struct StoredFloat16 {
  using Element = uint16_t;
  static constexpr float kScale = 1.0f;
  static PUMICE_VECTOR Vec load(const uint16_t* x);
};

struct StoredInt8 {
  using Element = int8_t;
  static constexpr float kScale = 1.0f;
  static PUMICE_VECTOR Vec load(const int8_t* x);
};

struct StoredFloat8 {  // as the float16 it becomes by two shifts: see cache_element.h
  using Element = uint8_t;
  static constexpr float kScale = kFloat8OfFloat16;
  static PUMICE_VECTOR Vec load(const uint8_t* x);
};

#if defined(__AVX512F__)

PUMICE_VECTOR Vec StoredBFloat16::load(const uint16_t* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
PUMICE_VECTOR Vec StoredFloat16::load(const uint16_t* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
PUMICE_VECTOR Vec StoredInt8::load(const int8_t* x) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
PUMICE_VECTOR Vec StoredFloat8::load(const uint8_t* x) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm512_cvtph_ps(float8_to_float16_wide(bytes));
}

#elif defined(__AVX2__)

PUMICE_VECTOR Vec StoredBFloat16::load(const uint16_t* x) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
PUMICE_VECTOR Vec StoredFloat16::load(const uint16_t* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
PUMICE_VECTOR Vec StoredInt8::load(const int8_t* x) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
PUMICE_VECTOR Vec StoredFloat8::load(const uint8_t* x) {
  return _mm256_cvtph_ps(float8_to_float16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
}

#else

PUMICE_VECTOR Vec StoredBFloat16::load(const uint16_t* x) {
  return Vec{bfloat16_to_float(x[0]), bfloat16_to_float(x[1]), bfloat16_to_float(x[2]),
             bfloat16_to_float(x[3])};
}
PUMICE_VECTOR Vec StoredFloat16::load(const uint16_t* x) {
  return Vec{float16_to_float(x[0]), float16_to_float(x[1]), float16_to_float(x[2]),
             float16_to_float(x[3])};
}
PUMICE_VECTOR Vec StoredInt8::load(const int8_t* x) {
  return Vec{static_cast<float>(x[0]), static_cast<float>(x[1]), static_cast<float>(x[2]),
             static_cast<float>(x[3])};
}
PUMICE_VECTOR Vec StoredFloat8::load(const uint8_t* x) {
  uint16_t bits[kLanes];
  for (int i = 0; i < kLanes; ++i) bits[i] = float8_to_float16_bits(x[i]);
  return StoredFloat16::load(bits);
}

#endif

// f(one of the above)
template <typename F>
PUMICE_VECTOR void with_stored(CacheType type, DType dtype, const F& f) {
  if (type == CacheType::kFloat8E4M3) return f(StoredFloat8{});
  if (type == CacheType::kInt8) return f(StoredInt8{});
  if (dtype == DType::kFloat32) return f(StoredFloat32{});
  if (dtype == DType::kFloat16) return f(StoredFloat16{});
  return f(StoredBFloat16{});
}

// data[begin + i] = x[i], a loop for each type: the compiler makes vectors of it.
inline void store_elements(void* data, DType dtype, int64_t begin, int64_t count, const float* x) {
  if (dtype == DType::kFloat32) {
    std::memcpy(static_cast<float*>(data) + begin, x, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(data) + begin;
  if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < count; ++i) out[i] = float_to_bfloat16(x[i]);
    return;
  }
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
  }
#endif
  for (; i < count; ++i) out[i] = float_to_float16(x[i]);
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
