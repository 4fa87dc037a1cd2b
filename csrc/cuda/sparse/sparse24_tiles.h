// Which tile of the 2:4 products multiplies a shape, and in how many parts of K. Pure functions of
// numbers, tested on the host (tests/cuda/). The choices rest on counted bytes and instructions: no
// GPU was at hand to tune them.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

namespace pumice::cuda {

// What a warp takes of an operand in a slice of K: four mma.sp.
constexpr int kSparse24Steps = 4;
constexpr int kSparse24TokenBytes = 64 * kSparse24Steps;  // of a token

enum class Sparse24Kind { k16Bit, kInt8, kInt4 };

template <Sparse24Kind kKind>
struct Sparse24Format;
template <>
struct Sparse24Format<Sparse24Kind::k16Bit> {
  static constexpr int kStepK = 32;        // columns of an mma.sp
  static constexpr int kValueBytes = 128;  // of a row: half of the columns are kept
  static constexpr int kMetaBytes = 16;
};
template <>
struct Sparse24Format<Sparse24Kind::kInt8> {
  static constexpr int kStepK = 64;
  static constexpr int kValueBytes = 128;
  static constexpr int kMetaBytes = 32;
};
template <>
struct Sparse24Format<Sparse24Kind::kInt4> {  // multiplied in 16 bit
  static constexpr int kStepK = 32;
  static constexpr int kValueBytes = 32;
  static constexpr int kMetaBytes = 16;
};

// Columns that share a scale of int4 weights are a multiple of this, or all: two mma.sp.
constexpr int kSparse24ChunkK = 64;
// Chunks are counted in 16 bits; longer rows are written out in 16 bits first.
constexpr int64_t kSparse24MaxInt4K = int64_t{kSparse24ChunkK} << 15;

// One block's tile of y, seen as [rows of the weight][tokens], how its warps cut it, and along K.
template <Sparse24Kind kOfKind, int kTileRows, int kTileTokens, int kWarpsAlongRows,
          int kWarpsAlongTokens, int kWarpsAlongK, int kPipeline, int kResident>
struct Sparse24Tile {
  static constexpr Sparse24Kind kKind = kOfKind;
  using Format = Sparse24Format<kKind>;
  static constexpr int kRows = kTileRows;
  static constexpr int kTokens = kTileTokens;
  static constexpr int kWarpsRows = kWarpsAlongRows;
  static constexpr int kWarpsTokens = kWarpsAlongTokens;
  static constexpr int kWarpsK = kWarpsAlongK;
  static constexpr int kThreads = 32 * kWarpsRows * kWarpsTokens * kWarpsK;
  static constexpr int kStages = kPipeline;
  static constexpr int kBlocksPerSm = kResident;

  static constexpr int kWarpK = Format::kStepK * kSparse24Steps;
  static constexpr int kSliceK = kWarpK * kWarpsK;
  static constexpr int kWarpRows = kRows / kWarpsRows;
  static constexpr int kWarpTokens = kTokens / kWarpsTokens;
  static constexpr int kRowTiles = kWarpRows / 16;
  static constexpr int kTokenTiles = kWarpTokens / 8;

  // A stage of the ring: values, metadata, x; for int4 scales (fp32) and zero points (bytes).
  static constexpr int kValueRowBytes = kWarpsK * Format::kValueBytes;
  static constexpr int kMetaRowBytes = kWarpsK * Format::kMetaBytes;
  static constexpr int kTokenRowBytes = kWarpsK * kSparse24TokenBytes;
  static constexpr int kTerms =
      kKind == Sparse24Kind::kInt4 ? kRows * kSliceK / kSparse24ChunkK : 0;
  static constexpr int kMetaOffset = kRows * kValueRowBytes;
  static constexpr int kTokenOffset = kMetaOffset + kRows * kMetaRowBytes;
  static constexpr int kScaleOffset = kTokenOffset + kTokens * kTokenRowBytes;
  static constexpr int kZeroOffset = kScaleOffset + 4 * kTerms;
  static constexpr int kStageBytes = kZeroOffset + kTerms;

  // The sums of a tile take the place of the stages: [warp of K][token][row], 4 words of padding so
  // that the 4 token pairs and 8 rows that a warp stores at once lie in different banks.
  static constexpr int kSumStride = kRows + 4;
  static constexpr int kSumBytes = kWarpsK * kTokens * kSumStride * 4;
  static constexpr int kTailOffset = std::max(kStages * kStageBytes, kSumBytes);
  static constexpr size_t kSharedBytes = kTailOffset + 16;

  static_assert(kWarpRows % 16 == 0 && kWarpTokens % 8 == 0 && kStages >= 2);
};

// Values of 16 and of 8 bits. Up to 64 tokens the time is that of reading the weights, 18.6 bytes a
// clock and SM of an H200; with two row tiles a warp, fragments and copies take 40 % (8 tokens) to
// 95 % (64 tokens) of what shared memory gives in that time. Two warps along K make a slice of 256
// bytes of each row.
//
// 90 KB. Weights under way on an SM: 2 blocks · 3 stages · 18 KB; Little's law asks for 26 KB.
template <Sparse24Kind kKind>
using Sparse24Tile8 = Sparse24Tile<kKind, 64, 8, 2, 1, 2, 4, 2>;
template <Sparse24Kind kKind>
using Sparse24Tile32 = Sparse24Tile<kKind, 64, 32, 2, 1, 2, 3, 2>;  // 104 KB
// 70 KB, for every GPU from sm_80 on. Two blocks, 37 KB of weights under way.
template <Sparse24Kind kKind>
using Sparse24Tile64 = Sparse24Tile<kKind, 128, 64, 4, 1, 1, 2, 2>;
// For large M the tensor cores are the limit. A token's fragment is twice as large as a row's:
// warps of 64 rows × 64 tokens take 48 clocks of shared memory for 32 mma.sp, 64 × 32 take 64. At
// twice the rate that mma.sync reaches on a Hopper, 62 % of its tensor cores', 32 mma.sp take 52.
//
// 154 KB, which an A100 has, too.
template <Sparse24Kind kKind>
using Sparse24Tile128 = Sparse24Tile<kKind, 128, 128, 2, 4, 1, 3, 1>;
// 139 KB. Two stages will do: a slice keeps a Hopper's tensor cores busy for 1650 clocks.
template <Sparse24Kind kKind>
using Sparse24Tile256 = Sparse24Tile<kKind, 256, 128, 4, 2, 1, 2, 1>;

// int4. Widening takes the issue slots: no two warps widen the same weights up to 32 tokens.
using Sparse24Int4Tile8 = Sparse24Tile<Sparse24Kind::kInt4, 64, 8, 2, 1, 4, 3, 2>;       // 68 KB
using Sparse24Int4Tile16 = Sparse24Tile<Sparse24Kind::kInt4, 64, 16, 2, 1, 4, 3, 2>;     // 93 KB
using Sparse24Int4Tile32 = Sparse24Tile<Sparse24Kind::kInt4, 64, 32, 2, 1, 4, 3, 1>;     // 143 KB
using Sparse24Int4Tile64 = Sparse24Tile<Sparse24Kind::kInt4, 128, 64, 4, 2, 1, 3, 1>;    // 72 KB
using Sparse24Int4Tile128 = Sparse24Tile<Sparse24Kind::kInt4, 128, 128, 4, 2, 1, 3, 1>;  // 121 KB

enum class Sparse24TileName { k8, k16, k32, k64, k128, k256 };

struct Sparse24TileRow {
  Sparse24TileName name;
  int max_tokens;  // that it is made for
  int rows, tokens, slice_k;
  size_t shared_bytes;
  double rate;  // of the best tile's multiplications
};

template <class Tile>
constexpr Sparse24TileRow describe_sparse24(Sparse24TileName name, int max_tokens, double rate) {
  return {name, max_tokens, Tile::kRows, Tile::kTokens, Tile::kSliceK, Tile::kSharedBytes, rate};
}

// Without a bound on the tokens.
constexpr int kAnyTokens = 1 << 30;

template <Sparse24Kind kKind>
constexpr auto kSparse24Tiles =
    std::array{describe_sparse24<Sparse24Tile8<kKind>>(Sparse24TileName::k8, 8, 0.1),
               describe_sparse24<Sparse24Tile32<kKind>>(Sparse24TileName::k32, 32, 0.3),
               describe_sparse24<Sparse24Tile64<kKind>>(Sparse24TileName::k64, 64, 0.6),
               describe_sparse24<Sparse24Tile128<kKind>>(Sparse24TileName::k128, kAnyTokens, 0.8),
               describe_sparse24<Sparse24Tile256<kKind>>(Sparse24TileName::k256, kAnyTokens, 1.0)};
template <>
constexpr auto kSparse24Tiles<Sparse24Kind::kInt4> =
    std::array{describe_sparse24<Sparse24Int4Tile8>(Sparse24TileName::k8, 8, 0.1),
               describe_sparse24<Sparse24Int4Tile16>(Sparse24TileName::k16, 16, 0.2),
               describe_sparse24<Sparse24Int4Tile32>(Sparse24TileName::k32, 32, 0.3),
               describe_sparse24<Sparse24Int4Tile64>(Sparse24TileName::k64, 64, 0.6),
               describe_sparse24<Sparse24Int4Tile128>(Sparse24TileName::k128, kAnyTokens, 1.0)};

struct Sparse24Plan {
  Sparse24TileName tile;
  int rows, tokens, slice_k;
  int parts;  // of K, each of a block of its own
};

constexpr int64_t sparse24_blocks_along(int64_t size, int block) {
  return (size + block - 1) / block;
}

constexpr int64_t sparse24_tile_count(const Sparse24Plan& plan, int64_t m, int64_t n) {
  return sparse24_blocks_along(m, plan.tokens) * sparse24_blocks_along(n, plan.rows);
}

constexpr Sparse24Plan sparse24_plan_of(const Sparse24TileRow& row) {
  return {row.name, row.rows, row.tokens, row.slice_k, 1};
}

// Rounds of blocks, as they take turns on the SMs, times what one takes.
constexpr double sparse24_cost(const Sparse24TileRow& row, int64_t m, int64_t n, int sm_count) {
  const int64_t tiles = sparse24_tile_count(sparse24_plan_of(row), m, n);
  const auto rounds = static_cast<double>((tiles + sm_count - 1) / sm_count);
  return rounds * row.rows * row.tokens / row.rate;
}

// Of the tiles that fit the device: the first that is made for so few tokens, else the cheapest of
// those without a bound; on devices that lack these k64. Operands whose rows are not aligned come
// through registers, in two shapes only.
template <Sparse24Kind kKind>
constexpr Sparse24Plan choose_sparse24_tile(int64_t m, int64_t n, bool aligned, int sm_count,
                                            size_t shared_memory_limit) {
  constexpr auto& tiles = kSparse24Tiles<kKind>;
  const auto named = [&](Sparse24TileName name) {
    for (const Sparse24TileRow& row : tiles) {
      if (row.name == name) return sparse24_plan_of(row);
    }
    return Sparse24Plan{};
  };
  if (!aligned) return named(m <= 8 ? Sparse24TileName::k8 : Sparse24TileName::k64);
  const Sparse24TileRow* best = nullptr;
  for (const Sparse24TileRow& row : tiles) {
    if (row.shared_bytes > shared_memory_limit) continue;
    if (row.max_tokens != kAnyTokens) {
      if (m <= row.max_tokens) return sparse24_plan_of(row);
    } else if (best == nullptr ||
               sparse24_cost(row, m, n, sm_count) < sparse24_cost(*best, m, n, sm_count)) {
      best = &row;
    }
  }
  return best ? sparse24_plan_of(*best) : named(Sparse24TileName::k64);
}

// Splits K where there are tiles for less than three quarters of the SMs, as long as every part has
// 4 slices: the exchange of the sums and the zeroing of tickets cost some 3 µs.
template <Sparse24Kind kKind>
constexpr Sparse24Plan plan_sparse24(int64_t m, int64_t n, int64_t k, bool aligned, int sm_count,
                                     size_t shared_memory_limit) {
  constexpr int64_t kMaxParts = 16, kMinSlices = 4;
  Sparse24Plan plan = choose_sparse24_tile<kKind>(m, n, aligned, sm_count, shared_memory_limit);
  const int64_t tiles = sparse24_tile_count(plan, m, n);
  if (4 * tiles >= 3 * sm_count) return plan;
  const int64_t slices = sparse24_blocks_along(k, plan.slice_k);
  const int64_t parts = std::min({kMaxParts, sm_count / tiles, slices / kMinSlices});
  plan.parts = static_cast<int>(std::max<int64_t>(parts, 1));
  return plan;
}

// What the parts of all tiles take in global memory: their sums, and a ticket for each tile.
constexpr int64_t sparse24_partial_bytes(const Sparse24Plan& plan, int64_t m, int64_t n) {
  if (plan.parts == 1) return 0;
  return sparse24_tile_count(plan, m, n) * plan.parts * plan.rows * plan.tokens * 4;
}
constexpr int64_t sparse24_ticket_count(const Sparse24Plan& plan, int64_t m, int64_t n) {
  return plan.parts == 1 ? 0 : sparse24_tile_count(plan, m, n);
}

// From this many tokens on the kept int4 weights are written out in 16 bits for the call and
// multiplied as such: 1.25 bytes of traffic for each place of W, 23 µs for 8192 × 8192, which at
// 512 tokens is a quarter of the product's time, where widening in the kernel takes half of its
// issue slots. A projection until a GPU has measured it.
constexpr int64_t kSparse24DequantizeFrom = 512;

}  // namespace pumice::cuda
