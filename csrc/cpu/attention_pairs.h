// Products of bfloat16 by its own instruction (AVX512-BF16): a lane holds two neighbours of the
// summed dimension and the sum, in float, takes both products. Twice the multiply-adds of float.
//
// The instruction rounds each addition to nearest and takes denormal numbers as 0.
#pragma once

#include <algorithm>

#include "cpu/attention_block.h"
#include "cpu/attention_stored.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

#if defined(__AVX512BF16__)

constexpr bool kHasPairs = true;

// Blocks of pairs lie where blocks of floats do; loads and stores do not look at the bits.
struct Pairs {
  static PUMICE_VECTOR Vec multiply_add(Vec a, Vec b, Vec sum) {
    return _mm512_dpbf16_ps(sum, std::bit_cast<__m512bh>(a), std::bit_cast<__m512bh>(b));
  }
};

// For attention_dots.h: pairs of columns as they lie.
struct StoredPairs {
  using Element = uint32_t;
  static PUMICE_VECTOR Vec load(const uint32_t* x) {
    return _mm512_castsi512_ps(_mm512_loadu_si512(x));
  }
};

// A row of floats, `count` of them a multiple of 2 · kLanes, becomes a row of pairs in its place.
inline void pair_row(float* row, int64_t count) {
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    const __m512bh pairs = _mm512_cvtne2ps_pbh(load(row + i + kLanes), load(row + i));
    store(row + i / 2, std::bit_cast<Vec>(pairs));
  }
}

#else

constexpr bool kHasPairs = false;
using Pairs = Floats;
using StoredPairs = StoredFloat32;
inline void pair_row(float* /*row*/, int64_t /*count*/) {}

#endif

// Rows of bfloat16, two neighbours to a place; 0 in the padding.
inline void load_pairs(const void* x, int64_t begin, int64_t stride, int64_t rows, int64_t columns,
                       BlockRows<float> out) {
  for (int64_t i = 0; i < rows; ++i) {
    char* row = reinterpret_cast<char*>(out.row(i));
    const size_t size = static_cast<size_t>(columns) * sizeof(uint16_t);
    std::memcpy(row, static_cast<const uint16_t*>(x) + begin + i * stride, size);
    std::memset(row + size, 0, static_cast<size_t>(out.stride) * sizeof(float) - size);
  }
}

// The same, transposed; `scratch` as for load_transposed().
inline void load_transposed_pairs(const void* x, int64_t begin, int64_t stride, int64_t rows,
                                  int64_t columns, float* scratch, BlockRows<float> out) {
  const int64_t pairs = (columns + 1) / 2, width = padded_columns(pairs);
  for (int64_t i = 0; i < rows; i += kBlockPad) {
    const int64_t count = rows - i < kBlockPad ? rows - i : kBlockPad;
    load_pairs(x, begin + i * stride, stride, count, columns, {scratch, width});
    for (int64_t r = count * width; r < kBlockPad * width; ++r) scratch[r] = 0.0f;
    transpose_rows(scratch, width, out.data + i, out.stride, pairs);
  }
}

// Rows 2i and 2i + 1 of bfloat16 as pairs: place d of row i holds element d of both. What is
// missing of an odd number of rows is 0.
inline void load_row_pairs(const void* x, int64_t begin, int64_t stride, int64_t rows,
                           int64_t columns, BlockRows<float> out) {
  const int64_t padding = padded_columns(columns) - columns;
  for (int64_t i = 0; i < rows; i += 2) {
    const uint16_t* even = static_cast<const uint16_t*>(x) + begin + i * stride;
    float* row = out.row(i / 2);
    if (i + 1 < rows) {
      const uint16_t* odd = even + stride;
      for (int64_t d = 0; d < columns; ++d) {
        row[d] = std::bit_cast<float>(static_cast<uint32_t>(odd[d]) << 16 | even[d]);
      }
    } else {
      for (int64_t d = 0; d < columns; ++d) row[d] = std::bit_cast<float>(uint32_t{even[d]});
    }
    for (int64_t d = 0; d < padding; ++d) row[columns + d] = 0.0f;
  }
}

// Whether no element of `count` pairs has the exponent of Inf and NaN.
inline bool pairs_are_finite(const float* pairs, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(pairs[i]);
    largest = std::max({largest, bits & 0x7fff0000u, bits << 16 & 0x7fff0000u});
  }
  return largest < 0x7f800000u;
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
