// One panel of the packed 2:4 product: kPanel weight rows in the lanes of registers
// (sparse24_lanes.h), sixteen columns, a chunk of x, at a time.
//
// A lane is a packed word: the eight kept weights of its row in the four groups of a chunk. Their
// digits of x are picked by bytes out of the chunk, of which every 128-bit lane has a copy. A digit
// is stored as the unsigned byte digit + 128, so that a weight may be signed:
//
//   Σ (digit + 128) · (q - zero) = Σ digit · (q - zero) + 128 · Σ (q - zero)
//
// where the last sum is the same for all rows of x. One header for each instruction set gives
//
//   Kept           two registers of weights, and of the bytes of x that they multiply
//   decode         the Kept of two chunks from their words and their word of places
//   add_products   adds a chunk's products with the digits of a row of x
//   for_tiles      a Kept as dot wants it
//   dot            sums of products of chunks, kRows rows of x to kPanel columns, and what it needs
//   and few operations more
#pragma once

#include <cstdint>

#include "cpu/int4_panel.h"
#include "cpu/sparse24_lanes.h"

#if defined(__AVX2__)

namespace pumice::cpu::PUMICE_ISA {
namespace {

static_assert(kPanel == kRowLanes);

constexpr int64_t kChunk = 16;  // columns
constexpr int64_t kBlockChunks = kActivationBlock / kChunk;

// Kept weights of a chunk, one a byte, as differences from their zero points. As decoded the first
// register holds the first of each of four groups, the second the second.
struct Kept {
  IntLanes weights[2], places[2];
};

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA

#endif

#if defined(__AVX512VNNI__)
#include "cpu/sparse24_int4_panel_avx512vnni.h"
#elif defined(__AVX2__)
#include "cpu/sparse24_int4_panel_avx2.h"
#endif
