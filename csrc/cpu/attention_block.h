// Products of small matrices of floats that lie in cache, the work of attention forward and
// backward:
//
//   multiply_block      c[i, j] = Σ_l a(i, l) · b[l, j]        (or +=)
//   load_block          rows of a tensor as float, each padded with zeros to whole registers
//   load_transposed     the same, transposed
//
// The left operand is read element by element and may lie in any order (a row of c times a
// broadcast element), so P^T·V takes P as it is; the right one and c lie along rows whose number
// of columns is padded to kBlockPad. A tile of c, kTileRows by kTileVectors registers, stays in
// registers while l runs: each step loads kTileVectors registers and kTileRows elements for
// kTileRows · kTileVectors multiply-adds. The sum over l runs upwards from 0 for every element of
// c, whatever tile it falls into, and only then joins what was there: a row's bits do not depend on
// the rows beside it, and long sums made of many products round like short ones.
#pragma once

#include <cstdint>

#include "cpu/attention_transpose.h"
#include "cpu/attention_vector.h"
#include "cpu/element.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

// Columns of blocks are padded to a multiple of this, whole registers on every instruction set.
constexpr int64_t kBlockPad = 16;

constexpr int64_t padded_columns(int64_t n) { return (n + kBlockPad - 1) / kBlockPad * kBlockPad; }

// a(i, l) = data[i · row + l · step]
struct LeftOperand {
  const float* data;
  int64_t row, step = 1;
};

// Rows of floats, each kBlockPad-padded.
template <typename T>
struct BlockRows {
  T* data;
  int64_t stride;
  T* row(int64_t i) const { return data + i * stride; }
};

#if defined(__AVX512F__)
// 24 of 32 registers accumulate, 4 hold b, and one the element of a.
constexpr int kTileRows = 6, kTileVectors = 4;
#elif defined(__AVX2__)
// 12 of 16 registers; 8 rows of one register would load more for each product.
constexpr int kTileRows = 6, kTileVectors = 2;
#else
// 8 of the 16 registers of SSE2, where a product takes a register of its own.
constexpr int kTileRows = 4, kTileVectors = 2;
#endif

// What a lane of a, a lane of b and a lane of the sum are to each other.
struct Floats {
  static PUMICE_VECTOR Vec multiply_add(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
};

template <int kRows, int kVectors, bool kAccumulate, typename Lanes>
void multiply_tile(const LeftOperand& a, const float* b, int64_t b_stride, float* c,
                   int64_t c_stride, int64_t k) {
  Vec sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sum[i][j] = zero();
  }
  const float* left = a.data;
  const int64_t row = a.row, step = a.step;
  for (int64_t l = 0; l < k; ++l, left += step, b += b_stride) {
    Vec right[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) right[j] = load(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec element = broadcast(left[i * row]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        sum[i][j] = Lanes::multiply_add(element, right[j], sum[i][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      float* at = c + i * c_stride + j * kLanes;
      store(at, kAccumulate ? add(load(at), sum[i][j]) : sum[i][j]);
    }
  }
}

// Rows [0, m) of kVectors registers; the last m % kTileRows of them in a tile of their own.
template <int kVectors, bool kAccumulate, typename Lanes, int kRows = kTileRows>
void multiply_panel(LeftOperand a, const float* b, int64_t b_stride, float* c, int64_t c_stride,
                    int64_t m, int64_t k) {
  for (; m >= kRows; m -= kRows) {
    multiply_tile<kRows, kVectors, kAccumulate, Lanes>(a, b, b_stride, c, c_stride, k);
    a.data += kRows * a.row;
    c += kRows * c_stride;
  }
  if constexpr (kRows > 1) {
    if (m > 0)
      multiply_panel<kVectors, kAccumulate, Lanes, kRows - 1>(a, b, b_stride, c, c_stride, m, k);
  }
}

// c[i, j] (+)= Σ_{l < k} a(i, l) · b[l, j] for i < m and j < n, where n is a multiple of kBlockPad.
template <bool kAccumulate, typename Lanes = Floats, int kVectors = kTileVectors>
void multiply_block(const LeftOperand& a, BlockRows<const float> b, BlockRows<float> c, int64_t m,
                    int64_t n, int64_t k) {
  constexpr int64_t kColumns = kVectors * kLanes;
  for (; n >= kColumns; n -= kColumns) {
    multiply_panel<kVectors, kAccumulate, Lanes>(a, b.data, b.stride, c.data, c.stride, m, k);
    b.data += kColumns;
    c.data += kColumns;
  }
  if constexpr (kVectors > 1) {
    if (n > 0) multiply_block<kAccumulate, Lanes, kVectors - 1>(a, b, c, m, n, k);
  }
}

// out[i, d] = x[begin + i · stride + d] for i < rows and d < columns; 0 in the padding.
inline void load_block(const void* x, DType dtype, int64_t begin, int64_t stride, int64_t rows,
                       int64_t columns, BlockRows<float> out) {
  const int64_t padding = padded_columns(columns) - columns;
  for (int64_t i = 0; i < rows; ++i) {
    float* row = out.row(i);
    load_elements(x, dtype, begin + i * stride, columns, row);
    for (int64_t d = 0; d < padding; ++d) row[columns + d] = 0.0f;
  }
}

// out[d, i] = x[begin + i · stride + d] for i < rows and d < columns; 0 in the padding of i.
// `scratch` is room for kBlockPad rows of padded_columns(columns).
inline void load_transposed(const void* x, DType dtype, int64_t begin, int64_t stride, int64_t rows,
                            int64_t columns, float* scratch, BlockRows<float> out) {
  const int64_t width = padded_columns(columns);
  for (int64_t i = 0; i < rows; i += kBlockPad) {
    const int64_t count = rows - i < kBlockPad ? rows - i : kBlockPad;
    load_block(x, dtype, begin + i * stride, stride, count, columns, {scratch, width});
    for (int64_t r = count; r < kBlockPad; ++r) {
      for (int64_t d = 0; d < columns; ++d) scratch[r * width + d] = 0.0f;
    }
    transpose_rows(scratch, width, out.data + i, out.stride, columns);
  }
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
