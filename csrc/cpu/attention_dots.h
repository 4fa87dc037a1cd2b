// Products q·k for a few rows, the keys read once along their own rows: to transpose them would
// take longer than to multiply.
#pragma once

#include "cpu/attention_block.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

// out[i, j] = Σ_d q[i, d] · k[j, d] for i < rows and j < keys rounded up to kBlockPad; what lies
// past the last key is a product with that key. Columns are padded to whole registers with zeros in
// q, and with something finite in k.
//
// The sums of kLanes keys are kept as one register each; transposed, those add up lane by lane.
template <typename Keys>
inline void multiply_rows(BlockRows<const float> q, const Keys& k, BlockRows<float> out,
                          int64_t rows, int64_t keys, int64_t columns) {
  for (int64_t j = 0; j < padded_columns(keys); j += kLanes) {
    const float* key[kLanes];
    for (int t = 0; t < kLanes; ++t) key[t] = k.row(j + t < keys ? j + t : keys - 1);
    for (int64_t i = 0; i < rows; ++i) {
      const float* row = q.row(i);
      Vec sums[kLanes];
#pragma GCC unroll 16
      for (int t = 0; t < kLanes; ++t) sums[t] = zero();
      for (int64_t d = 0; d < columns; d += kLanes) {
        const Vec element = load(row + d);
#pragma GCC unroll 16
        for (int t = 0; t < kLanes; ++t) sums[t] = fma(element, load(key[t] + d), sums[t]);
      }
      transpose(sums);
#pragma GCC unroll 4
      for (int step = kLanes / 2; step > 0; step /= 2) {
#pragma GCC unroll 8
        for (int t = 0; t < step; ++t) sums[t] = add(sums[t], sums[t + step]);
      }
      store(out.row(i) + j, sums[0]);
    }
  }
}

// Rows of floats anywhere, as in the pages of a cache.
struct RowTable {
  const float* const* rows;
  const float* row(int64_t i) const { return rows[i]; }
};

// c[i, j] += Σ_{l < k} a(i, l) · b[l, j] in the order of multiply_block().
template <int kRows, int kVectors>
void add_products_tile(const LeftOperand& a, RowTable b, int64_t column, BlockRows<float> c,
                       int64_t k) {
  Vec sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sum[i][j] = zero();
  }
  for (int64_t l = 0; l < k; ++l) {
    const float* right = b.row(l) + column;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec element = broadcast(a.data[i * a.row + l * a.step]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        sum[i][j] = fma(element, load(right + j * kLanes), sum[i][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      float* at = c.row(i) + column + j * kLanes;
      store(at, add(load(at), sum[i][j]));
    }
  }
}

// The same for i < m, at most four, and j < n, a multiple of kLanes.
template <int kRows = 4>
void add_products(const LeftOperand& a, RowTable b, BlockRows<float> c, int64_t m, int64_t n,
                  int64_t k) {
  if constexpr (kRows > 1) {
    if (m < kRows) return add_products<kRows - 1>(a, b, c, m, n, k);
  }
  int64_t column = 0;
  for (; column + kTileVectors * kLanes <= n; column += kTileVectors * kLanes) {
    add_products_tile<kRows, kTileVectors>(a, b, column, c, k);
  }
  for (; column < n; column += kLanes) add_products_tile<kRows, 1>(a, b, column, c, k);
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
