// The tiles of flash_forward, the choice among them, and how keys are cut into parts. Pure
// functions of numbers, tested on the host (tests/cuda/attention_plans.cpp). The choices rest on
// counted bytes, registers and instructions: no GPU was at hand to tune them.
//
// Floors on an H200 (4.0 TB/s, dense bf16 some 790 TFLOP/s by wgmma, of which mma.sync reaches 60
// to 65 %, some 490):
//
//   D = 128, causal, 16k tokens, 16 heads: 1.1 TFLOP, 2.2 ms at 490 TFLOP/s. The tensor cores take
//   16384 clocks of an SM's warps for a tile of 128 × 64 at that rate; beside them each score costs
//   1 ex2 (16 a clock) and some 4 fp32 operations (128 a clock), 0.09 clocks of 0.2. Two blocks on
//   an SM overlap one's softmax with the other's products. Expected 75 % of the mma.sync rate, 370
//   TFLOP/s; FlashAttention-2 is recorded at 335. The floor of wgmma is not in reach of this
//   kernel. One query, 8k keys, D = 128, 8 KV heads: 33.5 MB of keys and values, 8.4 µs at 4.0
//   TB/s. Expected 80 %, 10.5 µs, of which some 2 µs are the second launch, the merge.
//
// What shared memory delivers (128 bytes a clock) decides the shape of a warp: an operand of 256
// bytes is loaded for each mma and row tile of 16 queries. At the rate of mma.sync that is 80 bytes
// a clock with 16 queries a warp, and 40 with 32, plus 20 for queries that do not stay in
// registers.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "cuda/attention/flash_layout.h"

namespace pumice::cuda {

// A block's tile: kRows queries (of all heads that share keys) at kKeys keys a step, in warps along
// the queries or, where there are few, along the keys. Tiles of keys and of values take turns in a
// ring of kRing slots; kRing - 1 are under way.
template <int kHeadDimUpTo, int kValueDimUpTo, int kRowsOfBlock, int kWarpsAlongKeys,
          int kSlotsOfRing, bool kKeepQuery, int kResident, int kKeysOfStep = 64,
          int kBytesOfElement = 2>
struct FlashTile {
  static constexpr int kHeadDim = kHeadDimUpTo;
  static constexpr int kValueDim = kValueDimUpTo;
  static constexpr int kRows = kRowsOfBlock;
  static constexpr int kKeys =
      kKeysOfStep;  // 64, as the squares of mask_blocks, where there are any
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpsKeys = kWarpsAlongKeys;
  static constexpr int kWarpsRows = kWarps / kWarpsKeys;
  static constexpr int kWarpRows = kRows / kWarpsRows;
  static constexpr int kWarpKeys = kKeys / kWarpsKeys;
  static constexpr int kRowTiles = kWarpRows / 16;
  static constexpr int kKeyTiles = kWarpKeys / 8;
  static constexpr int kValueTiles = kValueDim / 8;
  static constexpr int kRing = kSlotsOfRing;
  static constexpr bool kQueryInRegisters = kKeepQuery;
  static constexpr int kBlocksPerSm = kResident;

  static constexpr int kQueryBytes = kRows * kHeadDim * 2;
  static constexpr int kSlotBytes = kKeys * std::max(kHeadDim, kValueDim) * kBytesOfElement;
  static constexpr int kRingOffset = kQueryBytes;
  static constexpr int kBlockOffset = kRingOffset + kRing * kSlotBytes;
  static constexpr int kBlockBytes = 448;  // flash_mainloop.h: FlashBlock
  static constexpr size_t kSharedBytes = kBlockOffset + kBlockBytes;
  static_assert(kSharedBytes <= 99 * 1024, "fits every GPU from sm_80 on");

  // Results leave by way of the memory of the queries; the sums of warps along the keys, in fp32,
  // by that of the ring.
  static_assert(kValueDim <= kHeadDim && kWarpRows % 16 == 0 && kWarpKeys % 16 == 0);
  static_assert(kWarpsKeys == 1 || kWarpsKeys * kRows * kValueDim * 4 <= kRing * kSlotBytes);
};

// Many queries. Warps of 32 of them as long as their sums (D_v registers) and scores (64) fit into
// the 255 registers of a thread. Two blocks on an SM, on an Ampere (164 KB) too.
using FlashTile64 = FlashTile<64, 64, 128, 1, 3, true, 2>;      // 40 KB
using FlashTile96 = FlashTile<96, 96, 128, 1, 3, false, 2>;     // 60 KB
using FlashTile128 = FlashTile<128, 128, 128, 1, 3, false, 2>;  // 80 KB
// Keys longer than values (DeepSeek's prefill). A ring of two: 96 KB, that is two blocks on a
// Hopper and one in the 99 KB of sm_86 and sm_89.
using FlashTile192 = FlashTile<192, 128, 128, 1, 2, false, 2>;
// Here sums alone take 128 registers with 16 queries a warp. 96 KB, as above.
using FlashTile256 = FlashTile<256, 256, 64, 1, 2, false, 2>;

// Up to 16 rows (decoding: a query for each head of a group): the time is that of reading keys and
// values. Each warp takes 16 of 64 keys for all rows, so that none is idle. 26, 52 and 72 KB; keys
// and values under way on an SM: 64 KB and more, where Little's law asks for 20.
using FlashShort64 = FlashTile<64, 64, 16, 4, 3, true, 4>;
using FlashShort128 = FlashTile<128, 128, 16, 4, 3, true, 3>;
using FlashShort256 = FlashTile<256, 256, 16, 4, 2, false, 2>;

// Keys and values of a byte each (a paged cache of float8 or int8). With few rows tiles of twice as
// many keys, so that as many bytes are under way; with many as above.
using FlashBytes64 = FlashTile<64, 64, 128, 1, 3, true, 2, 64, 1>;      // 28 KB
using FlashBytes128 = FlashTile<128, 128, 128, 1, 3, false, 2, 64, 1>;  // 56 KB
using FlashBytes192 = FlashTile<192, 128, 128, 1, 2, false, 2, 64, 1>;  // 72 KB
using FlashBytes256 = FlashTile<256, 256, 64, 1, 3, false, 2, 64, 1>;   // 80 KB
using FlashBytesShort64 = FlashTile<64, 64, 16, 4, 3, true, 4, 128, 1>;
using FlashBytesShort128 = FlashTile<128, 128, 16, 4, 3, true, 3, 128, 1>;
using FlashBytesShort256 = FlashTile<256, 256, 16, 4, 2, false, 2, 128, 1>;

// fp32 (flash_forward_fp32.cu): 32 rows and 32 keys, for every head dim up to 256.
constexpr int kFlashRowsFp32 = 32;
constexpr int kFlashShortRows = 16;
constexpr int kFlashMaxHeadDim = 256;
constexpr int kFlashMaxParts = 32;

// How the sequences of a call are cut into blocks. What is said here of one sequence depends on its
// own lengths, the heads and the device alone, never on the batch: its bits are the same in any.
struct FlashPlan {
  int32_t tile_rows;   // of a block
  int32_t pack;        // heads that share a tile: row r is query r / pack of head r % pack
  int32_t grid_heads;  // heads / pack
  int32_t rows_above;  // serves sequences of more rows than this ...
  int32_t rows_up_to;  // ... up to this; the others are another plan's
  int32_t slots;       // blocks that fill the device
  int32_t min_keys;    // of a part
  int32_t items;       // blocks for a sequence and one of grid_heads: tiles × parts at most
  int32_t slab_items;  // partial results of a sequence: so many tiles of `slab_rows` rows
  int32_t slab_rows;

  PUMICE_HOST_DEVICE_MEMBER bool serves(int32_t q_len) const {
    return q_len * pack > rows_above && q_len * pack <= rows_up_to;
  }
  PUMICE_HOST_DEVICE_MEMBER int32_t tiles(int32_t q_len) const {
    return (q_len * pack + tile_rows - 1) / tile_rows;
  }
};

// Keys that the queries of a tile see at most; with listed globals or bits all may be.
PUMICE_HOST_DEVICE int32_t flash_visible_keys(const AttentionMask& mask, int32_t tile_queries,
                                              int32_t k_len) {
  const int32_t right = mask.causal ? smaller(mask.window_right, 0) : mask.window_right;
  if (mask.window_left >= kUnboundedWindow || right >= kUnboundedWindow || mask.global_count > 0) {
    return k_len;
  }
  const int64_t keys = static_cast<int64_t>(mask.window_left) + right + tile_queries +
                       larger(mask.sink_tokens, mask.global_tokens);
  return keys < k_len ? static_cast<int32_t>(keys) : k_len;
}

// Parts of the keys for a sequence: as many as its tiles leave of the device, none too short.
PUMICE_HOST_DEVICE int32_t flash_parts(const FlashPlan& plan, const AttentionMask& mask,
                                       int32_t q_len, int32_t k_len) {
  const int64_t all_blocks = static_cast<int64_t>(plan.tiles(q_len)) * plan.grid_heads;
  if (all_blocks == 0 || 2 * all_blocks > plan.slots) return 1;
  const auto blocks = static_cast<int32_t>(all_blocks);
  const int32_t keys = flash_visible_keys(mask, plan.tile_rows / plan.pack + 1, k_len);
  int32_t parts = smaller(keys / plan.min_keys, plan.slots / blocks);
  parts = smaller(parts, kFlashMaxParts);
  return larger(parts, 1);
}

// The first block of keys of part `part`, of `parts` of about as many blocks that may be visible.
PUMICE_HOST_DEVICE int32_t flash_part_begin(const BlockWalk& walk, int32_t part, int32_t parts) {
  const int32_t end = walk.block_end();
  if (part <= 0) return 0;
  if (part >= parts) return end;
  int32_t prefix = end, first = end, last = end;
  if (walk.count == 0) {
    prefix = smaller(end, (walk.prefix_end + walk.block - 1) / walk.block);
    first = larger(prefix, walk.low / walk.block);
    last = larger(first, (walk.high + walk.block - 1) / walk.block);
  }
  const int64_t visible = static_cast<int64_t>(prefix) + (last - first);
  const auto place = static_cast<int32_t>(visible * part / parts);
  return place < prefix ? place : smaller(end, first + (place - prefix));
}

// A mask that differs by head cannot be asked of a tile with several.
inline int64_t flash_pack(const AttentionProblem& problem) {
  return problem.mask.bits_head_stride != 0 ? 1 : problem.group();
}

// The plan for sequences of more than `rows_above` and up to `rows_up_to` rows (queries × pack).
inline FlashPlan plan_flash(const AttentionProblem& problem, int32_t tile_rows, int32_t slots,
                            int32_t min_keys, int64_t rows_above, int64_t rows_up_to) {
  FlashPlan plan;
  plan.tile_rows = tile_rows;
  plan.pack = static_cast<int32_t>(flash_pack(problem));
  plan.grid_heads = static_cast<int32_t>(problem.heads / plan.pack);
  plan.rows_above = static_cast<int32_t>(rows_above);
  plan.rows_up_to = static_cast<int32_t>(std::min<int64_t>(rows_up_to, INT32_MAX));
  plan.slots = slots;
  plan.min_keys = min_keys;
  const int64_t rows = std::min<int64_t>(problem.max_q * plan.pack, plan.rows_up_to);
  const auto max_q = static_cast<int32_t>(rows / plan.pack);
  const auto max_k = static_cast<int32_t>(problem.max_k);
  const int32_t tiles = plan.tiles(max_q);
  plan.slab_rows = static_cast<int32_t>(std::min<int64_t>(rows, tile_rows));
  if (!problem.packed() && problem.seq_lens == nullptr) {
    const int32_t parts = flash_parts(plan, problem.mask, max_q, max_k);
    plan.items = tiles * parts;
    plan.slab_items = parts == 1 ? 0 : plan.items * plan.grid_heads;
    return plan;
  }
  // Of any sequence: parts > 1 only where tiles · parts · grid_heads ≤ slots.
  const int32_t most_parts = std::min({max_k / min_keys, slots / plan.grid_heads, kFlashMaxParts});
  plan.items =
      most_parts <= 1
          ? tiles
          : std::max(tiles, std::min<int32_t>(slots / plan.grid_heads, tiles * most_parts));
  plan.slab_items =
      most_parts <= 1 ? 0 : std::min<int64_t>(slots, int64_t{tiles} * most_parts * plan.grid_heads);
  return plan;
}

// The plans of a call: which tiles serve which sequences. With cu_seqlens the host does not know
// the lengths, so that both kernels may be launched, each to find its own sequences; a sequence's
// tile does not depend on the others.
struct FlashPlans {
  std::array<FlashPlan, 2> plan;
  int count = 0;
};

// Rows of the tile for many queries.
constexpr int32_t flash_long_rows(int64_t head_dim, int64_t value_dim) {
  const bool wide = head_dim > FlashTile192::kHeadDim || value_dim > FlashTile192::kValueDim;
  return wide ? FlashTile256::kRows : FlashTile128::kRows;
}

// A part costs its partial results and a place in the merge, so that keys are cut only where that
// fills SMs which else have nothing to do: to one block on each with 64 rows or more, whose partial
// results are large; to two with few rows, where it is bytes under way that count.
inline FlashPlans plan_flash_calls(const AttentionProblem& problem, int sm_count) {
  FlashPlans plans;
  if (problem.dtype == DType::kFloat32) {
    plans.plan[plans.count++] =
        plan_flash(problem, kFlashRowsFp32, 2 * sm_count, 256, 0, INT32_MAX);
    return plans;
  }
  const int64_t rows = problem.max_q * flash_pack(problem);
  if (rows <= kFlashShortRows || problem.packed()) {
    plans.plan[plans.count++] =
        plan_flash(problem, kFlashShortRows, 2 * sm_count, 256, 0, kFlashShortRows);
  }
  if (rows > kFlashShortRows) {
    plans.plan[plans.count++] =
        plan_flash(problem, flash_long_rows(problem.head_dim, problem.value_dim), sm_count, 512,
                   kFlashShortRows, INT32_MAX);
  }
  return plans;
}

constexpr int64_t flash_blocks(const FlashPlan& plan, int64_t batch) {
  return batch * plan.grid_heads * plan.items;
}

// Rows of partial results of a call, each of `flash_partial_columns` numbers and an lse.
inline int64_t flash_partial_rows(const FlashPlan& plan, int64_t batch) {
  return batch * plan.slab_items * plan.slab_rows;
}
PUMICE_HOST_DEVICE int64_t flash_partial_columns(int64_t value_dim) {
  return (value_dim + 3) / 4 * 4;
}

// Rows of a sequence's results that may have to be merged: those of all heads, where parts > 1.
inline int64_t flash_merged_rows(const FlashPlan& plan, const AttentionProblem& problem) {
  const int64_t rows = std::min<int64_t>(problem.max_q * plan.pack, plan.rows_up_to);
  return std::min<int64_t>(rows * plan.grid_heads, int64_t{plan.slots} / 2 * plan.tile_rows);
}

// Where row `row` of tile `tile` and part `part` keeps its partial result.
PUMICE_HOST_DEVICE int64_t flash_partial_row(const FlashPlan& plan, int64_t batch, int32_t head,
                                             int32_t tiles, int32_t tile, int32_t parts,
                                             int32_t part, int32_t row) {
  const int64_t item = (static_cast<int64_t>(head) * tiles + tile) * parts + part;
  return (batch * plan.slab_items + item) * plan.slab_rows + row;
}

}  // namespace pumice::cuda
