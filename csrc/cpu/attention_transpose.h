// A square of registers, transposed: lane j of register i becomes lane i of register j.
//
// Each step exchanges squares of half the registers' rows and columns that lie across the diagonal,
// first single lanes, then pairs, then quarters of a register.
#pragma once

#include "cpu/attention_vector.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

#if defined(__AVX2__)

// Registers 4g … 4g + 3 hold, in each quarter (four lanes) of their own, a transposed 4 × 4 square.
template <typename Register, typename Low, typename High, typename LowPair, typename HighPair>
PUMICE_VECTOR void transpose_quarters(Register (&x)[kLanes], Low low, High high, LowPair low_pair,
                                      HighPair high_pair) {
#pragma GCC unroll 4
  for (int g = 0; g < kLanes; g += 4) {
    const Register a = low(x[g], x[g + 1]), b = high(x[g], x[g + 1]);
    const Register c = low(x[g + 2], x[g + 3]), d = high(x[g + 2], x[g + 3]);
    x[g] = low_pair(a, c);
    x[g + 1] = high_pair(a, c);
    x[g + 2] = low_pair(b, d);
    x[g + 3] = high_pair(b, d);
  }
}

#endif

#if defined(__AVX512F__)

PUMICE_VECTOR void transpose(Vec (&x)[kLanes]) {
  transpose_quarters(
      x, [](Vec a, Vec b) { return _mm512_unpacklo_ps(a, b); },
      [](Vec a, Vec b) { return _mm512_unpackhi_ps(a, b); },
      [](Vec a, Vec b) { return _mm512_shuffle_ps(a, b, 0x44); },
      [](Vec a, Vec b) { return _mm512_shuffle_ps(a, b, 0xee); });
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    // Quarter q of register 4g + r belongs into register 4q + r, as its quarter g.
    const Vec a = _mm512_shuffle_f32x4(x[r], x[r + 4], 0x88);
    const Vec b = _mm512_shuffle_f32x4(x[r], x[r + 4], 0xdd);
    const Vec c = _mm512_shuffle_f32x4(x[r + 8], x[r + 12], 0x88);
    const Vec d = _mm512_shuffle_f32x4(x[r + 8], x[r + 12], 0xdd);
    x[r] = _mm512_shuffle_f32x4(a, c, 0x88);
    x[r + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    x[r + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
    x[r + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

#elif defined(__AVX2__)

PUMICE_VECTOR void transpose(Vec (&x)[kLanes]) {
  transpose_quarters(
      x, [](Vec a, Vec b) { return _mm256_unpacklo_ps(a, b); },
      [](Vec a, Vec b) { return _mm256_unpackhi_ps(a, b); },
      [](Vec a, Vec b) { return _mm256_shuffle_ps(a, b, 0x44); },
      [](Vec a, Vec b) { return _mm256_shuffle_ps(a, b, 0xee); });
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    const Vec low = x[r], high = x[r + 4];
    x[r] = _mm256_permute2f128_ps(low, high, 0x20);
    x[r + 4] = _mm256_permute2f128_ps(low, high, 0x31);
  }
}

#else

PUMICE_VECTOR void transpose(Vec (&x)[kLanes]) {
  const Vec a = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5);
  const Vec b = __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7);
  const Vec c = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5);
  const Vec d = __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
  x[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  x[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  x[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  x[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}

#endif

// out[d, i] = x[i, d] for i < kBlockPad rows and d < columns, where rows of x are padded to whole
// registers and those of out begin at multiples of kLanes.
inline void transpose_rows(const float* x, int64_t x_stride, float* out, int64_t out_stride,
                           int64_t columns) {
  constexpr int64_t kRows = 16;
  for (int64_t i = 0; i < kRows; i += kLanes) {
    for (int64_t d = 0; d < columns; d += kLanes) {
      Vec square[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) square[r] = load(x + (i + r) * x_stride + d);
      transpose(square);
      const int64_t count = columns - d < kLanes ? columns - d : kLanes;
      if (count == kLanes) {
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) store(out + (d + r) * out_stride + i, square[r]);
      } else {
        float rows[kLanes][kLanes];
        for (int r = 0; r < kLanes; ++r) store(rows[r], square[r]);
        for (int64_t r = 0; r < count; ++r) store(out + (d + r) * out_stride + i, load(rows[r]));
      }
    }
  }
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
