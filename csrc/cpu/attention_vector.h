// One register of floats on the instruction set this file is compiled for, and what the attention
// kernels do with it. Intrinsics, not the compiler's vectors, where a fused multiply-add is meant:
// the build contracts nothing by itself.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pumice::cpu::PUMICE_ISA {
namespace {

#define PUMICE_VECTOR inline __attribute__((always_inline))

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using Vec = __m512;

PUMICE_VECTOR Vec load(const float* p) { return _mm512_loadu_ps(p); }
PUMICE_VECTOR void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
PUMICE_VECTOR Vec broadcast(float x) { return _mm512_set1_ps(x); }
PUMICE_VECTOR Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
PUMICE_VECTOR Vec subtract(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
PUMICE_VECTOR Vec multiply(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
PUMICE_VECTOR Vec divide(Vec a, Vec b) { return _mm512_div_ps(a, b); }
// a·b + c
PUMICE_VECTOR Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// The greater or lesser of the two; x where either is NaN.
PUMICE_VECTOR Vec maximum(Vec bound, Vec x) { return _mm512_max_ps(bound, x); }
PUMICE_VECTOR Vec minimum(Vec bound, Vec x) { return _mm512_min_ps(bound, x); }
PUMICE_VECTOR Vec magnitude(Vec x) { return _mm512_abs_ps(x); }
// Lane i of x where bit i of `bits` is set, else of `otherwise`.
PUMICE_VECTOR Vec select(uint32_t bits, Vec x, Vec otherwise) {
  return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), otherwise, x);
}
// Bit i: whether lane i of a is below that of b.
PUMICE_VECTOR uint32_t less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
PUMICE_VECTOR Vec round_to_integer(Vec x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// x · 2^n for integers -126 ≤ n ≤ 127
PUMICE_VECTOR Vec times_power_of_two(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }
PUMICE_VECTOR float sum(Vec x) { return _mm512_reduce_add_ps(x); }

#elif defined(__AVX2__)

constexpr int kLanes = 8;
using Vec = __m256;

PUMICE_VECTOR Vec load(const float* p) { return _mm256_loadu_ps(p); }
PUMICE_VECTOR void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
PUMICE_VECTOR Vec broadcast(float x) { return _mm256_set1_ps(x); }
PUMICE_VECTOR Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
PUMICE_VECTOR Vec subtract(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
PUMICE_VECTOR Vec multiply(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
PUMICE_VECTOR Vec divide(Vec a, Vec b) { return _mm256_div_ps(a, b); }
PUMICE_VECTOR Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
PUMICE_VECTOR Vec maximum(Vec bound, Vec x) { return _mm256_max_ps(bound, x); }
PUMICE_VECTOR Vec minimum(Vec bound, Vec x) { return _mm256_min_ps(bound, x); }
PUMICE_VECTOR Vec magnitude(Vec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
PUMICE_VECTOR Vec select(uint32_t bits, Vec x, Vec otherwise) {
  const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane_bit);
  return _mm256_blendv_ps(otherwise, x, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane_bit)));
}
PUMICE_VECTOR uint32_t less(Vec a, Vec b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)));
}
PUMICE_VECTOR Vec round_to_integer(Vec x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
PUMICE_VECTOR Vec times_power_of_two(Vec x, Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
PUMICE_VECTOR float sum(Vec x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

#else

// Four lanes of whatever vectors the processor has.
constexpr int kLanes = 4;
typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(16)));

PUMICE_VECTOR Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
PUMICE_VECTOR void store(float* p, Vec x) { std::memcpy(p, &x, sizeof(x)); }
PUMICE_VECTOR Vec broadcast(float x) { return Vec{x, x, x, x}; }
PUMICE_VECTOR Vec add(Vec a, Vec b) { return a + b; }
PUMICE_VECTOR Vec subtract(Vec a, Vec b) { return a - b; }
PUMICE_VECTOR Vec multiply(Vec a, Vec b) { return a * b; }
PUMICE_VECTOR Vec divide(Vec a, Vec b) { return a / b; }
PUMICE_VECTOR Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }  // not fused
PUMICE_VECTOR Vec maximum(Vec bound, Vec x) { return bound > x ? bound : x; }
PUMICE_VECTOR Vec minimum(Vec bound, Vec x) { return bound < x ? bound : x; }
PUMICE_VECTOR Vec magnitude(Vec x) { return x < 0.0f ? -x : x; }
PUMICE_VECTOR Vec select(uint32_t bits, Vec x, Vec otherwise) {
  const IntVec lane_bit = {1, 2, 4, 8};
  return ((lane_bit & static_cast<int32_t>(bits)) != 0) ? x : otherwise;
}
PUMICE_VECTOR uint32_t less(Vec a, Vec b) {
  const IntVec below = a < b;
  return static_cast<uint32_t>((below[0] & 1) | (below[1] & 2) | (below[2] & 4) | (below[3] & 8));
}
// Adding 1.5 · 2^23 leaves no room for a fraction; beyond 2^22 there is none to lose.
PUMICE_VECTOR Vec round_to_integer(Vec x) {
  const Vec rounded = (x + 0x1.8p23f) - 0x1.8p23f;
  return magnitude(x) < 0x1p22f ? rounded : x;
}
PUMICE_VECTOR Vec times_power_of_two(Vec x, Vec n) {
  return x * reinterpret_cast<Vec>((__builtin_convertvector(n, IntVec) + 127) << 23);
}
PUMICE_VECTOR float sum(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }

#endif

PUMICE_VECTOR Vec zero() { return broadcast(0.0f); }

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
