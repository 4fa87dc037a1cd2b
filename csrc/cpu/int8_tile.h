// A tile of the int8 product: kTileM rows of q times kTileN weight rows, as dot products along K.
// One header for each instruction set gives
//
//   kTileM, kTileN       the sums that fit into registers
//   prepared_row_bytes   what it keeps for a row of q, and
//   prepare_row          fills in
//   streamed_row_bytes   what it reads of a row of q
//   dot_tile<kRows>      sums[i][j] = Σ_k q[row + i, k] · weight_rows[j][k], exactly, i < kRows
#pragma once

#include <cstdint>

namespace pumice::cpu::PUMICE_ISA {

// The weight rows to come, fetched into L2 while the present ones are multiplied: memory is the
// limit at small M, and hardware prefetchers stop at the end of a page, here the end of a row. A
// tile fetches four streams, stream s from first + s·stride on, at 1/2^shift of the speed it
// multiplies.
struct Prefetch {
  const int8_t* first;
  int64_t stride;
  int shift;
};
constexpr int kPrefetchStreams = 4;

}  // namespace pumice::cpu::PUMICE_ISA

#if defined(__AVX512VNNI__)
#include "cpu/int8_tile_avx512vnni.h"
#elif defined(__AVX2__)
#include "cpu/int8_tile_avx2.h"
#else
#include "cpu/int8_tile_portable.h"
#endif
