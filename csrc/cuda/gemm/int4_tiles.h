// Which tile of int4_gemm multiplies a shape, and in how many parts of K. Pure functions of
// numbers. The choices rest on counted bytes and instructions: no GPU was at hand to tune them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace pumice::cuda {

constexpr int kInt4WarpK = 128;  // values of K of a warp and slice
constexpr int kInt4ChunkK = 32;  // values of K of one ldmatrix row, and of two mma

// One block's tile of y, seen as [rows of the weight][tokens], how its warps cut it, and along K.
// kPlanes: 16-bit planes of x, 2 for fp32.
template <int kTileRows, int kTileTokens, int kWarpsAlongRows, int kWarpsAlongTokens,
          int kWarpsAlongK, int kResident, int kPlanesOfX = 1>
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

  // As deep as two blocks fit the 227 KB of a Hopper, or one the 163 KB of an Ampere.
  static constexpr int kStages =
      std::min(4, (kBlocksPerSm == 2 ? 113 * 1024 : 162 * 1024) / kStageBytes);

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
// fragments of x take of shared memory: at 32 tokens 76 of 128 bytes a clock; 64 rows fill 128 SMs
// at N = 8192; four warps along K make a slice long enough (256 bytes of each row) that one barrier
// a slice does not show. Weights under way on an SM: 2 blocks · 2 stages · 16 KB.
using Int4Tile8 = Int4Tile<64, 8, 2, 1, 4, 2>;
using Int4Tile16 = Int4Tile<64, 16, 2, 1, 4, 2>;
using Int4Tile32 = Int4Tile<64, 32, 2, 1, 4, 1>;
// 84 KB: two blocks on an SM, so that one multiplies while the other waits, and fits the 99 KB of
// sm_86 and sm_89.
using Int4Tile64 = Int4Tile<128, 64, 4, 2, 1, 2>;
// Fewest bytes from L2 for each product: 128 × 128 outputs for 40 KB of operands.
using Int4Tile128 = Int4Tile<128, 128, 4, 2, 1, 1>;
// fp32 x: two planes.
using Int4SplitTile8 = Int4Tile<64, 8, 2, 1, 4, 2, 2>;
using Int4SplitTile64 = Int4Tile<128, 64, 4, 2, 1, 1, 2>;

struct Int4Plan {
  int rows, tokens, slice_k;
  int parts;
};

constexpr int64_t int4_blocks_along(int64_t size, int block) { return (size + block - 1) / block; }

constexpr int64_t int4_tile_count(const Int4Plan& plan, int64_t m, int64_t n) {
  return int4_blocks_along(m, plan.tokens) * int4_blocks_along(n, plan.rows);
}

// The tile for m tokens. `few_tiles`: fp32 x or the general path, which have two shapes only.
constexpr Int4Plan choose_int4_tile(int64_t m, bool few_tiles, size_t shared_memory_limit) {
  const auto plan_of = []<class Tile>(Tile) {
    return Int4Plan{Tile::kRows, Tile::kTokens, Tile::kSliceK, 1};
  };
  if (m <= 8) return plan_of(Int4Tile8{});
  if (few_tiles) return plan_of(Int4Tile64{});
  if (m <= 16 && Int4Tile16::kSharedBytes <= shared_memory_limit) return plan_of(Int4Tile16{});
  if (m <= 32 && Int4Tile32::kSharedBytes <= shared_memory_limit) return plan_of(Int4Tile32{});
  if (m <= 64 || Int4Tile128::kSharedBytes > shared_memory_limit) return plan_of(Int4Tile64{});
  return plan_of(Int4Tile128{});
}

// Splits K where there are tiles for less than three quarters of the SMs, as long as every part has
// 4 slices: the exchange of the sums and the zeroing of tickets cost some 3 µs.
constexpr Int4Plan plan_int4(int64_t m, int64_t n, int64_t k, bool few_tiles, int sm_count,
                             size_t shared_memory_limit) {
  constexpr int64_t kMaxParts = 16, kMinSlices = 4;
  Int4Plan plan = choose_int4_tile(m, few_tiles, shared_memory_limit);
  const int64_t tiles = int4_tile_count(plan, m, n);
  if (4 * tiles >= 3 * sm_count) return plan;
  const int64_t slices = int4_blocks_along(k, plan.slice_k);
  const int64_t parts = std::min({kMaxParts, sm_count / tiles, slices / kMinSlices});
  plan.parts = static_cast<int>(std::max<int64_t>(parts, 1));
  return plan;
}

// What the parts of all tiles take in global memory: their sums, and a ticket for each tile.
constexpr int64_t int4_partial_bytes(const Int4Plan& plan, int64_t m, int64_t n) {
  if (plan.parts == 1) return 0;
  return int4_tile_count(plan, m, n) * plan.parts * plan.rows * plan.tokens * 4;
}
constexpr int64_t int4_ticket_count(const Int4Plan& plan, int64_t m, int64_t n) {
  return plan.parts == 1 ? 0 : int4_tile_count(plan, m, n);
}

}  // namespace pumice::cuda
