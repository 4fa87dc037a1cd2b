// The two products for a few rows, keys and values read once, where they lie and as they are
// stored: to transpose or to convert them beforehand would take longer than to multiply.
//
// Meanwhile other vectors are fetched into the second level of cache, a line for each that is read:
// all at once they would make the products wait, and then memory for the products.
//
// Sums run in the order of multiply_block(), and over whole registers of columns.
#pragma once

#include "cpu/attention_block.h"
#include "cpu/attention_pairs.h"
#include "cpu/attention_stored.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

// Rows of the left operand at a time: their sums and a vector of each fill the registers.
constexpr int kDotRows = 4;

// Rows of numbers anywhere, as in the pages of a cache, and as many to fetch.
template <class Stored>
struct RowTable {
  using Element = typename Stored::Element;
  const void* const* rows;
  const void* const* next;

  const Element* row(int64_t i) const { return static_cast<const Element*>(rows[i]); }
  // Elements [d, d + kLanes) of `next`, once a line.
  PUMICE_VECTOR void fetch(int64_t i, int64_t d) const {
    const int64_t byte = d * static_cast<int64_t>(sizeof(Element));
    if (byte % 64 == 0) __builtin_prefetch(static_cast<const char*>(next[i]) + byte, 0, 2);
  }
};

// out[i, j] = Σ_d q[i, d] · k[j, d] for kRows rows and j < keys rounded up to kBlockPad; what lies
// past the last key is a product with that key.
//
// The sums of kLanes pairs of a row and a key are kept as one register each; transposed, those add
// up lane by lane.
template <class Stored, class Lanes, int kRows>
void multiply_rows_tile(BlockRows<const float> q, RowTable<Stored> k, BlockRows<float> out,
                        int64_t keys, int64_t columns) {
  constexpr int kKeys = kLanes / kRows;
  for (int64_t j = 0; j < padded_columns(keys); j += kKeys) {
    const typename Stored::Element* key[kKeys];
    for (int t = 0; t < kKeys; ++t) key[t] = k.row(j + t < keys ? j + t : keys - 1);
    Vec sums[kLanes];
#pragma GCC unroll 16
    for (int s = 0; s < kLanes; ++s) sums[s] = zero();
    for (int64_t d = 0; d < columns; d += kLanes) {
      Vec element[kRows];
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) element[i] = load(q.row(i) + d);
#pragma GCC unroll 16
      for (int t = 0; t < kKeys; ++t) {
        const Vec right = Stored::load(key[t] + d);
        k.fetch(j + t, d);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
          Vec& sum = sums[i * kKeys + t];
          sum = Lanes::multiply_add(element[i], right, sum);
        }
      }
    }
    transpose(sums);
#pragma GCC unroll 4
    for (int step = kLanes / 2; step > 0; step /= 2) {
#pragma GCC unroll 8
      for (int s = 0; s < step; ++s) sums[s] = add(sums[s], sums[s + step]);
    }
    float products[kLanes];
    store(products, sums[0]);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      std::memcpy(out.row(i) + j, products + i * kKeys, kKeys * sizeof(float));
    }
  }
}

// The same for `rows` of them, at most kDotRows, so many at a time as divide a register.
template <class Stored, class Lanes = Floats>
void multiply_rows(BlockRows<const float> q, RowTable<Stored> k, BlockRows<float> out, int64_t rows,
                   int64_t keys, int64_t columns) {
  if (rows == 4) return multiply_rows_tile<Stored, Lanes, 4>(q, k, out, keys, columns);
  if (rows >= 2) multiply_rows_tile<Stored, Lanes, 2>(q, k, out, keys, columns);
  if (rows % 2 == 0) return;
  if (rows == 3) k.next = k.rows;
  multiply_rows_tile<Stored, Lanes, 1>({q.row(rows - 1), q.stride}, k,
                                       {out.row(rows - 1), out.stride}, keys, columns);
}

// c[i, j] += Σ_{l < k} a(i, l) · b[l, j]
template <class Stored, int kRows, int kVectors>
void add_products_tile(const LeftOperand& a, RowTable<Stored> b, int64_t column, BlockRows<float> c,
                       int64_t k) {
  Vec sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sum[i][j] = zero();
  }
  for (int64_t l = 0; l < k; ++l) {
    Vec right[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      right[j] = Stored::load(b.row(l) + column + j * kLanes);
      b.fetch(l, column + j * kLanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec element = broadcast(a.data[i * a.row + l * a.step]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[i][j] = fma(element, right[j], sum[i][j]);
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

// The same for i < m, at most kDotRows, and j < n, a multiple of kLanes.
template <class Stored, int kRows = kDotRows>
void add_products(const LeftOperand& a, RowTable<Stored> b, BlockRows<float> c, int64_t m,
                  int64_t n, int64_t k) {
  if constexpr (kRows > 1) {
    if (m < kRows) return add_products<Stored, kRows - 1>(a, b, c, m, n, k);
  }
  int64_t column = 0;
  for (; column + kTileVectors * kLanes <= n; column += kTileVectors * kLanes) {
    add_products_tile<Stored, kRows, kTileVectors>(a, b, column, c, k);
  }
  for (; column < n; column += kLanes) add_products_tile<Stored, kRows, 1>(a, b, column, c, k);
}

// Whether all elements of `rows` rows are finite: x·0 is 0 of every finite x, NaN of the others.
template <class Stored>
bool rows_are_finite(RowTable<Stored> x, int64_t rows, int64_t columns) {
  Vec nothing = zero();
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t d = 0; d < columns; d += kLanes) {
      nothing = fma(Stored::load(x.row(i) + d), zero(), nothing);
    }
  }
  return sum(nothing) == 0.0f;
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
