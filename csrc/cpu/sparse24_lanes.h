// Weight rows side by side in the lanes of a register, for the products of panels of them.
//
// A row of kept weights, and one of their places, is contiguous along K. Sixteen bytes of each of
// kRowLanes rows are read at a time and transposed, so that lane i of a register is a 32-bit word
// of row i. What follows then runs along the lanes: each weight row picks its elements of x out of
// one broadcast of them, and sums are of whole rows. One header for each instruction set gives
//
//   kRowLanes, RowWords  32-bit lanes, and a register of them
//   load_words           four registers from 16 bytes of each row, or from fewer
//   load_square          kRowLanes registers from as many words of each row, or from fewer: whole
//                        cache lines where rows are long, for those of rows whose length is a
//                        multiple of 4 KB lie in one set of L1, which has fewer ways than rows
//
// (the portable kernels have no lanes).
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__AVX512VNNI__)
#include "cpu/sparse24_lanes_avx512vnni.h"
#elif defined(__AVX2__)
#include "cpu/sparse24_lanes_avx2.h"
#endif

#if defined(__AVX2__)

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr int64_t kWordBytes = 16;  // of a row that load_words reads

// Rows begin … begin + kRowLanes - 1 of a matrix of `end` rows; past the end the last one again.
inline void rows_of(const void* matrix, int64_t row_bytes, int64_t begin, int64_t end,
                    const uint8_t* (&rows)[kRowLanes]) {
  for (int i = 0; i < kRowLanes; ++i) {
    rows[i] = static_cast<const uint8_t*>(matrix) + std::min(begin + i, end - 1) * row_bytes;
  }
}

// Memory is the limit at small M, and hardware prefetchers stop at the end of a page: a cache line
// of each row is fetched into L2 by hand. Always inline: GCC takes a function of prefetches alone
// for one without effects, and drops the call.
inline __attribute__((always_inline)) void prefetch_rows(const uint8_t* const (&rows)[kRowLanes],
                                                         int64_t at) {
#pragma GCC unroll 16
  for (int i = 0; i < kRowLanes; ++i) __builtin_prefetch(rows[i] + at, 0, 2);
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA

#endif
