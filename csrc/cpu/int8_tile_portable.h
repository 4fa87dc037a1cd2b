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

int64_t prepared_row_bytes(int64_t k) { return k * int64_t{sizeof(int16_t)}; }
int64_t streamed_row_bytes(int64_t k) { return prepared_row_bytes(k); }

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
    int32_t sum[kRows] = {};
    for (int64_t l = 0; l < k; ++l) {
      const int16_t wl = w[l];
      for (int i = 0; i < kRows; ++i) sum[i] += static_cast<int32_t>(x[i * k + l]) * wl;
    }
    for (int i = 0; i < kRows; ++i) sums[i][j] = sum[i];
  }
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
