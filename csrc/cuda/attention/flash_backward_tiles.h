// The tiles of flash_backward. The choices rest on counted bytes, registers and instructions: no
// GPU was at hand to tune them.
//
// An mma.sync m16n8k16 takes 2 clocks of an SM of an Ampere and 1.6 of a Hopper (62 % of wgmma's
// rate), and shared memory delivers 128 bytes a clock. Each 256 bytes of a B operand serve as many
// mma as a warp has row tiles of 16; so a warp has two, that is 32 keys (or queries), as long as
// their sums fit into its registers, and loads 128 to 192 bytes an mma, 1.0 to 1.5 clocks.
//
// grad_key, grad_value: the sums of 32 keys are 2 · D registers a lane, too many for one warp. So
// warps go in pairs: one computes P and adds up grad_value, the other grad_out·valueᵀ, dS and
// grad_key, two products each; P goes from the first to the second by shared memory, in 16 bit.
// grad_query: D registers a lane for 32 queries. Two warps share the queries, and take half of the
// keys of a tile each.
//
// Floors on an H200 (dense bf16 some 790 TFLOP/s by wgmma, some 490 by mma.sync), as useful work
// goes: five products of 2·S_q·S_k·D flops. The first kernel does four and the second three, so
// that at most 5/7 of 490, 350 TFLOP/s, is in reach. Beside the products each score costs one ex2
// (16 a clock) and some 8 fp32 operations (128 a clock) in each kernel: 0.13 clocks, of which 0.05
// to 0.1 are not hidden, where four products of D = 128 take 0.4. Expected 70 % of the floor, some
// 250 TFLOP/s (B·H = 16, 16k tokens, D = 128, causal: 2.7 TFLOP, 11 ms); FlashAttention-2 is
// recorded at some 300 there, FlashAttention-3 at 550. D = 64: half the products for each
// exponential, expected 200.
#pragma once

#include <cstddef>

namespace pumice::cuda {

// grad_key and grad_value of kKeys keys, at kQueries queries a step. Query and grad_out in two
// stages, of which one is under way.
template <int kDimUpTo, int kPairsOfWarps, int kRowTilesOfWarp, int kQueriesOfStep, int kResident>
struct FlashGradKeysTile {
  static constexpr int kHeadDim = kDimUpTo;
  static constexpr int kPairs = kPairsOfWarps;
  static constexpr int kRowTiles = kRowTilesOfWarp;
  static constexpr int kWarpKeys = 16 * kRowTiles;
  static constexpr int kKeys = kPairs * kWarpKeys;
  static constexpr int kQueries = kQueriesOfStep;
  static constexpr int kThreads = 2 * 32 * kPairs;
  static constexpr int kBlocksPerSm = kResident;

  static constexpr int kKeyBytes = kKeys * kHeadDim * 2;
  static constexpr int kQueryBytes = kQueries * kHeadDim * 2;
  static constexpr int kRowBytes = kQueries * 8;
  static constexpr int kStageBytes = 2 * kQueryBytes + kRowBytes;
  static constexpr int kStageOffset = 2 * kKeyBytes;
  static constexpr int kExchangeOffset = kStageOffset + 2 * kStageBytes;
  static constexpr int kHeadOffset = kExchangeOffset + kKeys * kQueries * 2;
  static constexpr int kHeadBytes = 256;  // FlashGradHead
  static constexpr size_t kSharedBytes = kHeadOffset + kHeadBytes;
};

// grad_query of kQueries queries, at kKeys keys a step. Key and value in two stages.
template <int kDimUpTo, int kWarpsAlongQueries, int kRowTilesOfWarp, int kKeysOfWarp, int kResident>
struct FlashGradQueriesTile {
  static constexpr int kHeadDim = kDimUpTo;
  static constexpr int kRowWarps = kWarpsAlongQueries;
  static constexpr int kKeyWarps = 2;
  static constexpr int kRowTiles = kRowTilesOfWarp;
  static constexpr int kWarpQueries = 16 * kRowTiles;
  static constexpr int kQueries = kRowWarps * kWarpQueries;
  static constexpr int kWarpKeys = kKeysOfWarp;
  static constexpr int kKeys = kKeyWarps * kWarpKeys;
  static constexpr int kThreads = 32 * kRowWarps * kKeyWarps;
  static constexpr int kBlocksPerSm = kResident;

  static constexpr int kQueryBytes = kQueries * kHeadDim * 2;
  static constexpr int kKeyBytes = kKeys * kHeadDim * 2;
  static constexpr int kStageBytes = 2 * kKeyBytes;
  static constexpr int kStageOffset = 2 * kQueryBytes;
  static constexpr int kRowOffset = kStageOffset + 2 * kStageBytes;
  static constexpr int kHeadOffset = kRowOffset + kQueries * 8;
  static constexpr int kHeadBytes = 256;  // FlashGradHead
  static constexpr size_t kSharedBytes = kHeadOffset + kHeadBytes;

  // At the end one of the two warps leaves its sums there, in fp32.
  static_assert(kQueries * kHeadDim * 4 <= 2 * kStageBytes);
};

// Head dims up to 64: blocks of 4 warps, three of them on an SM, of at most 168 registers (156 and
// 168 on sm_90). 37 and 49 KB.
using FlashGradKeys64 = FlashGradKeysTile<64, 2, 2, 32, 3>;
using FlashGradQueries64 = FlashGradQueriesTile<64, 2, 2, 32, 3>;

// Up to 128: 8 warps of 255 and 244 registers, one block on an SM. 145 and 129 KB, of the 163 that
// a block has on sm_80, and of the 227 on sm_90.
using FlashGradKeys128 = FlashGradKeysTile<128, 4, 2, 64, 1>;
using FlashGradQueries128 = FlashGradQueriesTile<128, 4, 2, 32, 1>;

// The same head dims in the 99 KB of sm_86, sm_89 and sm_120: 69 and 65 KB,
// 132 and 118 registers.
using FlashGradKeys128Compact = FlashGradKeysTile<128, 4, 1, 32, 1>;
using FlashGradQueries128Compact = FlashGradQueriesTile<128, 4, 1, 16, 1>;

// Up to 256: the sums of 16 keys or queries take as many registers as those of 32 with 128. 133 and
// 129 KB, 196 and 185 registers.
using FlashGradKeys256 = FlashGradKeysTile<256, 4, 1, 32, 1>;
using FlashGradQueries256 = FlashGradQueriesTile<256, 4, 1, 16, 1>;

// In 99 KB: 4 warps. 98.8 and 96.5 KB.
using FlashGradKeys256Compact = FlashGradKeysTile<256, 2, 1, 32, 1>;
using FlashGradQueries256Compact = FlashGradQueriesTile<256, 2, 1, 16, 1>;

// What a block may have on every GPU since sm_80.
constexpr size_t kSharedBytesOfAll = 99 * 1024;
static_assert(FlashGradKeys64::kSharedBytes <= kSharedBytesOfAll &&
              FlashGradQueries64::kSharedBytes <= kSharedBytesOfAll &&
              FlashGradKeys128Compact::kSharedBytes <= kSharedBytesOfAll &&
              FlashGradQueries128Compact::kSharedBytes <= kSharedBytesOfAll &&
              FlashGradKeys256Compact::kSharedBytes <= kSharedBytesOfAll &&
              FlashGradQueries256Compact::kSharedBytes <= kSharedBytesOfAll);
// The keys' tile is what decides between a tile and its compact one.
static_assert(FlashGradQueries128::kSharedBytes <= FlashGradKeys128::kSharedBytes &&
              FlashGradQueries256::kSharedBytes <= FlashGradKeys256::kSharedBytes);

}  // namespace pumice::cuda
