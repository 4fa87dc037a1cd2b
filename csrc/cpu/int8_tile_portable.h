// Tiles of int8 dot products in plain C++.
//
// Activations are widened to int16 once: int16 × int16 pairs summed into int32 are one instruction
// on every vector unit (pmaddwd, smlal), and compilers find it in this loop.
#pragma once

#include <cstdint>

#include "cpu/int8_tile.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr int kTileM = 4;
constexpr int kTileN = 4;

int64_t prepared_bytes_of(int64_t m, int64_t k) { return m * k * 2; }

void prepare_row(const int8_t* q, int64_t k, int64_t row, void* prepared) {
  int16_t* x = static_cast<int16_t*>(prepared) + row * k;
  for (int64_t i = 0; i < k; ++i) x[i] = q[row * k + i];
}

template <int kRows>
void dot_tile(const int8_t* /*q*/, const void* prepared, int64_t row, int64_t k,
              const int8_t* const (&weight_rows)[kTileN], const Prefetch& /*prefetch*/,
              int32_t (*sums)[kTileN]) {
  const int16_t* x = static_cast<const int16_t*>(prepared) + row * k;
  for (int j = 0; j < kTileN; ++j) {
    const int8_t* w = weight_rows[j];
    for (int i = 0; i < kRows; ++i) {
      const int16_t* xi = x + i * k;
      int32_t sum = 0;
      for (int64_t l = 0; l < k; ++l)
        sum += static_cast<int32_t>(xi[l]) * static_cast<int16_t>(w[l]);
      sums[i][j] = sum;
    }
  }
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
