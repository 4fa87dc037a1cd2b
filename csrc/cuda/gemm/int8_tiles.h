// Which tile of int8_gemm multiplies a shape: a table, and a model of a kernel's time to choose by.
// Pure functions of numbers, tested on the host (tests/cuda/). An implementation for one
// architecture only (Hopper's wgmma) joins as another row with its own rates.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace pumice::cuda {

// One block's tile of y, and how its warps cut it. The inner loop takes K in slices of 128 bytes:
// as many as one swizzled row of shared memory (eight 16-byte chunks, one for each group of 4
// banks).
template <int kM, int kN, int kWarpsAlongM, int kWarpsAlongN, int kPipeline, int kResident>
struct Int8Tile {
  static constexpr int kBlockM = kM;
  static constexpr int kBlockN = kN;
  static constexpr int kBlockK = 128;
  static constexpr int kWarpsM = kWarpsAlongM;
  static constexpr int kWarpsN = kWarpsAlongN;
  static constexpr int kWarpM = kM / kWarpsAlongM;
  static constexpr int kWarpN = kN / kWarpsAlongN;
  static constexpr int kThreads = 32 * kWarpsAlongM * kWarpsAlongN;
  static constexpr int kStages = kPipeline;
  static constexpr int kBlocksPerSm = kResident;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0);
};

// Up to 64 rows, bound by the weights' bandwidth: narrow, so that N = 8192 fills 128 SMs, and deep:
// 5 of 6 stages under way, 40 KB of weights on an SM.
using Tile64x64 = Int8Tile<64, 64, 2, 2, 6, 2>;
// Less deep, for the 99 KB of sm_86 and sm_89: with the outlier phase at its largest, 89 KB.
using Tile64x64Shallow = Int8Tile<64, 64, 2, 2, 4, 2>;
// Up to 128 rows: every weight is read once, by half as many bytes of q for each as above.
using Tile128x64 = Int8Tile<128, 64, 2, 2, 4, 2>;
// Warps of 64 × 64: an mma then takes 32 bytes of shared memory a clock, a quarter of what there
// is. Two blocks, so that one multiplies while the other waits or stores.
using Tile128x128 = Int8Tile<128, 128, 2, 2, 3, 2>;
// The same warps, and fewest bytes from L2 for each product, which limits 128 × 128 on a Hopper: 30
// instead of 40 bytes a clock and SM at full speed. One block; four stages as 227 KB hold, and
// three for the 163 KB of an Ampere.
using Tile128x256 = Int8Tile<128, 256, 2, 4, 4, 1>;
using Tile128x256Shallow = Int8Tile<128, 256, 2, 4, 3, 1>;

enum class Int8TileName { k64x64Shallow, k64x64, k128x64, k128x128, k128x256, k128x256Shallow };

struct Int8TileRow {
  Int8TileName name;
  int block_m, block_n, threads, stages, blocks_per_sm;
  int macs_per_clock;  // of an SM, what the warp tile's shared memory traffic leaves of the peak
};

template <class Tile>
constexpr Int8TileRow describe(Int8TileName name, int macs_per_clock) {
  return {name,          Tile::kBlockM,      Tile::kBlockN, Tile::kThreads,
          Tile::kStages, Tile::kBlocksPerSm, macs_per_clock};
}

constexpr std::array<Int8TileRow, 6> kInt8Tiles = {
    describe<Tile64x64Shallow>(Int8TileName::k64x64Shallow, 1400),
    describe<Tile64x64>(Int8TileName::k64x64, 1500),
    describe<Tile128x64>(Int8TileName::k128x64, 1900),
    describe<Tile128x128>(Int8TileName::k128x128, 2400),
    describe<Tile128x256>(Int8TileName::k128x256, 2450),
    describe<Tile128x256Shallow>(Int8TileName::k128x256Shallow, 2400),
};

constexpr int kInt8BlockK = 128;

// The outlier phase (int8_outliers.h): 16 columns at a time, in 16 bit, and the list of columns.
constexpr int kOutlierStep = 16;
constexpr int kOutlierListCapacity = 512;

struct Int8GemmShape {
  int64_t m, n, k;
  int64_t mask_words;  // of an outlier mask; 0 where there is no outlier phase
  DType x_dtype;
};

// A shape's plan. With more than one part, blocks share a tile of y: each multiplies a part of K,
// and the last to finish adds the others' sums to its own. For few rows, where there are fewer
// tiles than SMs, and larger tiles in parts take fewer bytes from L2 than small tiles.
struct Int8Plan {
  Int8TileRow tile;
  int parts;
};

constexpr int64_t tiles_along(int64_t size, int block) { return (size + block - 1) / block; }
constexpr int64_t slices_of(int64_t k) { return tiles_along(k, kInt8BlockK); }
constexpr int64_t int8_tile_count(const Int8TileRow& tile, const Int8GemmShape& shape) {
  return tiles_along(shape.m, tile.block_m) * tiles_along(shape.n, tile.block_n);
}

// Shared memory of a block, in the order in which int8_gemm.cu takes it.
constexpr size_t int8_shared_bytes(const Int8TileRow& tile, const Int8GemmShape& shape) {
  const size_t rows = static_cast<size_t>(tile.block_m + tile.block_n);
  size_t bytes = tile.stages * rows * kInt8BlockK + 16;
  if (shape.mask_words) {
    const size_t low_half = shape.x_dtype == DType::kFloat32 ? tile.block_m : 0;
    bytes += (rows + low_half) * kOutlierStep * 2;
    bytes += (kOutlierListCapacity + 4) * 4 + shape.mask_words * 4;
  }
  return bytes;
}

// What the parts of all tiles take in global memory: their sums, and one ticket for each tile.
constexpr int64_t int8_partial_bytes(const Int8Plan& plan, const Int8GemmShape& shape) {
  if (plan.parts == 1) return 0;
  return int8_tile_count(plan.tile, shape) * plan.parts * plan.tile.block_m * plan.tile.block_n * 4;
}
constexpr int64_t int8_ticket_count(const Int8Plan& plan, const Int8GemmShape& shape) {
  return plan.parts == 1 ? 0 : int8_tile_count(plan.tile, shape);
}

// Clocks that the shape takes by this plan: the slowest of the tensor cores, the way into an SM and
// L2 (bytes a clock as measured by others on an H100), plus what a tile's start and end cost.
constexpr double int8_plan_clocks(const Int8Plan& plan, const Int8GemmShape& shape, int sm_count) {
  constexpr double kIntoSm = 48, kFromL2 = 28, kItemOverhead = 1500, kFenceOverhead = 1000;
  const Int8TileRow& tile = plan.tile;
  const double items = static_cast<double>(int8_tile_count(tile, shape)) * plan.parts;
  const double k = static_cast<double>(tiles_along(slices_of(shape.k), plan.parts)) * kInt8BlockK;
  const double rounds =
      static_cast<double>(static_cast<int64_t>((items + sm_count - 1) / sm_count));
  const double macs = static_cast<double>(tile.block_m) * tile.block_n * k / tile.macs_per_clock;
  const double bytes = (tile.block_m + tile.block_n) * k;
  // Sums are written once, and read again once or less.
  const double sum_bytes = plan.parts == 1 ? 0.0 : tile.block_m * tile.block_n * 4.0;
  const double exchange = plan.parts == 1 ? 0.0 : 2 * sum_bytes / kIntoSm + kFenceOverhead;
  const double from_l2 = items * (bytes + 2 * sum_bytes) / (kFromL2 * sm_count);
  return std::max(rounds * std::max(macs, bytes / kIntoSm), from_l2) +
         rounds * (kItemOverhead + exchange);
}

// The fastest plan that fits the device's shared memory; the first tile fits every GPU from sm_80
// on, for every K up to kMaxInt8K.
constexpr Int8Plan choose_int8_plan(const Int8GemmShape& shape, int sm_count,
                                    size_t shared_memory_limit) {
  constexpr int kMaxParts = 8;
  constexpr int64_t kMinSlices = 4;  // of a part, or it is all start and end
  Int8Plan best = {kInt8Tiles[0], 1};
  double best_clocks = int8_plan_clocks(best, shape, sm_count);
  for (const Int8TileRow& tile : kInt8Tiles) {
    if (int8_shared_bytes(tile, shape) > shared_memory_limit) continue;
    for (int parts = 1; parts <= kMaxParts; parts *= 2) {
      if (parts > 1 && slices_of(shape.k) < parts * kMinSlices) break;
      if (parts > 1 && int8_tile_count(tile, shape) * parts > sm_count * tile.blocks_per_sm) break;
      const Int8Plan plan = {tile, parts};
      const double clocks = int8_plan_clocks(plan, shape, sm_count);
      if (clocks < best_clocks) {
        best = plan;
        best_clocks = clocks;
      }
    }
  }
  return best;
}

// Persistent blocks: as many as are resident at once. An SM has 1 KB more than a block may have,
// and takes 1 KB for each block.
constexpr int int8_gemm_blocks(const Int8Plan& plan, const Int8GemmShape& shape, int sm_count,
                               size_t shared_memory_limit) {
  const size_t fitting =
      (shared_memory_limit + 1024) / (int8_shared_bytes(plan.tile, shape) + 1024);
  const int64_t resident = std::max<int64_t>(
      1, std::min<int64_t>(plan.tile.blocks_per_sm, static_cast<int64_t>(fitting)));
  const int64_t items = int8_tile_count(plan.tile, shape) * plan.parts;
  return static_cast<int>(std::min<int64_t>(items, resident * sm_count));
}

}  // namespace pumice::cuda
