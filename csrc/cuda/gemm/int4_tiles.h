// Which tile of int4_gemm multiplies a shape, and in how many parts of K. Pure functions of
// numbers. The choices rest on counted bytes and instructions: no GPU was at hand to tune them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/gemm/tile_plan.h"

namespace pumice::cuda {

constexpr int kInt4WarpK = 128;  // values of K of a warp and slice
constexpr int kInt4ChunkK = 32;  // values of K of one ldmatrix row, and of two mma

// One block's tile of y, seen as [rows of the weight][tokens], how its warps cut it, and along K.
// kPlanes: 16-bit planes of x, 2 for fp32.
template <int kTileRows, int kTileTokens, int kWarpsAlongRows, int kWarpsAlongTokens,
          int kWarpsAlongK, int kPipeline, int kResident, int kPlanesOfX = 1>
struct Int4Tile {
  static constexpr int kRows = kTileRows;
  static constexpr int kTokens = kTileTokens;
  static constexpr int kWarpsRows = kWarpsAlongRows;
  static constexpr int kWarpsTokens = kWarpsAlongTokens;
  static constexpr int kWarpsK = kWarpsAlongK;
  static constexpr int kThreads = 32 * kWarpsRows * kWarpsTokens * kWarpsK;
  static constexpr int kBlocksPerSm = kResident;
  static constexpr int kPlanes = kPlanesOfX;

  static constexpr int kSliceK = kInt4WarpK * kWarpsK;
  static constexpr int kWarpRows = kRows / kWarpsRows;
  static constexpr int kWarpTokens = kTokens / kWarpsTokens;
  static constexpr int kRowTiles = kWarpRows / 16;
  static constexpr int kTokenTiles = kWarpTokens / 8;

  // A stage of the ring: weights, x, scales (fp32) and zero points (bytes).
  static constexpr int kWeightRowBytes = kSliceK / 2;
  static constexpr int kTokenRowBytes = kSliceK * 2;
  static constexpr int kTermsPerRow = kSliceK / kInt4ChunkK;
  static constexpr int kWeightBytes = kRows * kWeightRowBytes;
  static constexpr int kPlaneBytes = kTokens * kTokenRowBytes;
  static constexpr int kTerms = kRows * kTermsPerRow;
  static constexpr int kTokenOffset = kWeightBytes;
  static constexpr int kScaleOffset = kTokenOffset + kPlanes * kPlaneBytes;
  static constexpr int kZeroOffset = kScaleOffset + 4 * kTerms;
  static constexpr int kStageBytes = kZeroOffset + kTerms;

  static constexpr int kStages = kPipeline;

  // The sums of a tile take the place of the stages: [warp of K][token][row], 4 words of padding so
  // that the 4 token pairs and 8 rows that a warp stores at once lie in different banks.
  static constexpr int kSumStride = kRows + 4;
  static constexpr int kSumBytes = kWarpsK * kTokens * kSumStride * 4;
  static constexpr int kTicketOffset = std::max(kStages * kStageBytes, kSumBytes);
  static constexpr size_t kSharedBytes = kTicketOffset + 16;

  static_assert(kWarpRows % 16 == 0 && kWarpTokens % 8 == 0 && kStages >= 2);
  static_assert(kWeightRowBytes >= 64 && kThreads % (kTokenRowBytes / 16) == 0);
};

// Up to 32 tokens the time is that of reading the weights. Two row tiles a warp halve what its
// fragments of x take of shared memory: at 32 tokens 76 of 128 bytes a clock. Four warps along K
// make a slice of 256 bytes of each row, so long that its barrier does not show. 87 KB; weights
// under way on an SM: 2 blocks · 2 stages · 16 KB.
using Int4Tile8 = Int4Tile<64, 8, 2, 1, 4, 3, 2>;
// Where there are 64 rows or fewer for each SM: twice the warps on it, which share K, for twice the
// bytes of x. 111 KB; at N = 8192 two blocks on an SM, as with 64 rows from N = 16896 on.
using Int4TileNarrow = Int4Tile<32, 8, 1, 1, 8, 3, 2>;
using Int4Tile16 = Int4Tile<64, 16, 2, 1, 4, 3, 2>;  // 111 KB, two of which a Hopper has
using Int4Tile32 = Int4Tile<64, 32, 2, 1, 4, 3, 1>;  // 159 KB
// Here the issue slots are the limit: no two warps widen the same weights, as they would with warps
// side by side along the tokens. 159 KB
using Int4Tile64 = Int4Tile<128, 64, 4, 1, 2, 3, 1>;
// 128 KB. Fewest bytes from L2 for each product: 40 KB of operands for 128 × 128 × 128.
using Int4Tile128 = Int4Tile<128, 128, 4, 2, 1, 3, 1>;
// 80 KB, for the 99 KB of sm_86 and sm_89, and for the general path.
using Int4TileCompact = Int4Tile<128, 64, 4, 2, 1, 3, 1>;
// fp32 x: two planes. 74 and 128 KB.
using Int4SplitTile8 = Int4Tile<64, 8, 2, 1, 4, 2, 2, 2>;
using Int4SplitTileCompact = Int4Tile<128, 64, 4, 2, 1, 3, 1, 2>;

enum class Int4TileName { kNarrow, k8, k16, k32, k64, k128, kCompact };

struct Int4Plan : TilePlan {
  Int4TileName tile;
};

template <class Tile>
constexpr Int4Plan int4_plan_of(Int4TileName name) {
  return {{Tile::kRows, Tile::kTokens, Tile::kSliceK, 1}, name};
}

// The tile for m tokens; k8 and kCompact (k8 for fp32) fit every GPU from sm_80 on. fp32 x and the
// general path have two shapes only.
constexpr Int4Plan choose_int4_tile(int64_t m, int64_t n, bool is_fp32, bool general, int sm_count,
                                    size_t shared_memory_limit) {
  constexpr Int4Plan k8 = int4_plan_of<Int4Tile8>(Int4TileName::k8);
  constexpr Int4Plan kCompact = int4_plan_of<Int4TileCompact>(Int4TileName::kCompact);
  if (m <= 8) {
    const bool narrow = !is_fp32 && !general && tile_count(k8, m, n) <= sm_count &&
                        Int4TileNarrow::kSharedBytes <= shared_memory_limit;
    return narrow ? int4_plan_of<Int4TileNarrow>(Int4TileName::kNarrow) : k8;
  }
  if (is_fp32) return Int4SplitTileCompact::kSharedBytes <= shared_memory_limit ? kCompact : k8;
  if (general || Int4Tile32::kSharedBytes > shared_memory_limit) return kCompact;
  if (m <= 16) return int4_plan_of<Int4Tile16>(Int4TileName::k16);
  if (m <= 32) return int4_plan_of<Int4Tile32>(Int4TileName::k32);
  if (m <= 64) return int4_plan_of<Int4Tile64>(Int4TileName::k64);
  return int4_plan_of<Int4Tile128>(Int4TileName::k128);
}

// The tile, and the parts of K.
constexpr Int4Plan plan_int4(int64_t m, int64_t n, int64_t k, bool is_fp32, bool general,
                             int sm_count, size_t shared_memory_limit) {
  Int4Plan plan = choose_int4_tile(m, n, is_fp32, general, sm_count, shared_memory_limit);
  plan.parts = parts_of_k(plan, m, n, k, sm_count);
  return plan;
}

// From this many tokens on, 16-bit x is multiplied by torch's own product (cuBLAS) with the weight
// written out in 16 bits (int4_dequantized.h) in place of int4_gemm.
//
// A projection until a GPU has measured it. int4_gemm is expected at half of cuBLAS's bf16 rate R,
// for mma.sync and the widening of weights leave that much of a Hopper's tensor cores: 4·M·N·K / R
// seconds, where cuBLAS takes 2·M·N·K / R. Dequantization moves 0.5 bytes in and 2 out for each
// weight. The product reads the 2 bytes again, but behind its arithmetic from M = 170 on. At
// R = 700 TFLOP/s and 3.6 TB/s both ways are equal at M = (2.5 / 3.6e12) · R / 2 = 243; the double
// leaves room for what is guessed here, for rewriting x, and for the calls of more operators.
// The dequantization adds 243 / M to cuBLAS's time: 0.68 of its speed at M = 512, 0.95 from
// M = 4600 on.
constexpr int64_t kInt4DequantizeFrom = 512;

// fp32 x stays with int4_gemm, whose two bfloat16 planes are finer than TF32.
constexpr bool int4_dequantizes(int64_t m, bool is_fp32) {
  return m >= kInt4DequantizeFrom && !is_fp32;
}

// Rows of the weight that are written out at a time, so that they take at most `limit` bytes if
// that leaves 256 rows, a tile of cuBLAS's: parts of equal size, the last one may be smaller.
constexpr int64_t int4_rows_at_once(int64_t n, int64_t columns, int64_t limit) {
  constexpr int64_t kMultiple = 256;
  const int64_t most = std::max(limit / (2 * columns) / kMultiple, int64_t{1}) * kMultiple;
  const int64_t parts = blocks_along(n, static_cast<int>(most));
  const int64_t rows = (n + parts - 1) / parts;
  return parts == 1 ? n : (rows + kMultiple - 1) / kMultiple * kMultiple;
}

}  // namespace pumice::cuda
