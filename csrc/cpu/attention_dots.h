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
inline void multiply_rows(BlockRows<const float> q, BlockRows<const float> k, BlockRows<float> out,
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

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
