// How 2:4 weights lie in memory: the one layout of the state dict and of every kernel.
//
// Every group of four weights along K, a multiple of 4, keeps two; the others are zero.
//
//   values  [N, K/2]                 the kept weights of a row in the order of their columns
//   meta    uint8 [N, ceil(K/32)·4]  where they stood. Row n is a little-endian stream of 2-bit
//                                    places: kept weight j stood in column 4·(j/2) + place[j], and
//                                    place[j] occupies bits [2j, 2j + 2) of the stream.
//
//   So a group of four is a nibble, place 0 | place 1 << 2, the even group in the low one of its
//   byte, and a 32-bit word is eight groups, as mma.sp reads them:
//
//   word r = | group 8r+7 | … | group 8r+1 | group 8r |
//            bit 31     28       7        4  3       0
//
// The two places of a group ascend. A group with fewer than two nonzeros keeps zeros, in the lowest
// free columns, so that a matrix has one compressed form. Rows of meta are filled up to whole words
// with groups that keep columns 0 and 1.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace pumice {

constexpr int64_t kSparse24Group = 4;

// A group that keeps columns 0 and 1.
constexpr uint8_t kSparse24Filler = 0x4;

// Bytes of a row of meta.
PUMICE_HOST_DEVICE constexpr int64_t sparse24_meta_bytes(int64_t k) { return (k + 31) / 32 * 4; }

// The place in its group of kept weight j.
PUMICE_HOST_DEVICE int sparse24_place(const uint8_t* meta_row, int64_t j) {
  return meta_row[j / 4] >> (2 * (j % 4)) & 3;
}

PUMICE_HOST_DEVICE int64_t sparse24_column(const uint8_t* meta_row, int64_t j) {
  return j / 2 * kSparse24Group + sparse24_place(meta_row, j);
}

// The nibble of a group whose nonzeros are the set bits of `mask`, bit i for column i; 0, which no
// group has, for more than two.
PUMICE_HOST_DEVICE constexpr uint8_t sparse24_group(uint32_t mask) {
  // Nibble `mask` of it: from 0000, 0001, 0010 … on the right to 1111 on the left.
  constexpr uint64_t kNibbles = 0x000e'0dcc'0988'4444ULL;
  return static_cast<uint8_t>(kNibbles >> (4 * mask) & 0xf);
}

// Whether nibble is one that sparse24_group returns: two places that ascend.
PUMICE_HOST_DEVICE bool is_sparse24_group(uint32_t nibble) {
  return (nibble & 3) < (nibble >> 2 & 3);
}

static_assert(sparse24_group(0b0000) == 0x4 && sparse24_group(0b1000) == 0xc &&
              sparse24_group(0b0110) == 0x9 && sparse24_group(0b1100) == 0xe &&
              sparse24_group(0b0111) == 0);

}  // namespace pumice
