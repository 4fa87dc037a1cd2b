// Which part of the work a block does: sequence, head, tile of rows, part of the keys.
#pragma once

#include "cuda/attention/flash_tiles.h"
#include "cuda/device.h"

namespace pumice::cuda {

// What flash_forward is asked; the kernels' argument.
struct FlashForward {
  AttentionProblem problem;  // rows on boundaries of 16 bytes, D and D_v of `copied` elements
  FlashPlan plan;
  int32_t key_columns, value_columns;  // elements of a row that can be copied, multiples of 8
  void* out;                           // [tokens, H, D_v]
  float* lse;
  // Where keys are cut into parts: rows of partial results (flash_partial_row), and of their lse.
  float* partial_out;
  float* partial_lse;
};

struct FlashWork {
  FlashSequence sequence;
  int head0;  // the first of plan.pack heads
  int tile, tiles;
  int part, parts;
  int row0, rows;  // the tile's rows: [row0, row0 + rows)
  bool exists;

  explicit __device__ __forceinline__ FlashWork(const FlashForward& call) {
    const FlashPlan& plan = call.plan;
    const auto block = static_cast<int>(blockIdx.x);
    const int item = block % plan.items, head = block / plan.items;
    head0 = head % plan.grid_heads * plan.pack;
    sequence = flash_sequence(call.problem, head / plan.grid_heads);
    parts = flash_parts(plan, call.problem.mask, sequence.q_len, sequence.k_len);
    tiles = plan.tiles(sequence.q_len);
    // The last tiles first: under a causal mask they are the longest.
    tile = tiles - 1 - item / parts;
    part = item % parts;
    exists = plan.serves(sequence.q_len) && tile >= 0;
    row0 = tile * plan.tile_rows;
    rows = min(plan.tile_rows, sequence.q_len * plan.pack - row0);
  }

  // Row r of the tile: a query and a head.
  __device__ __forceinline__ int query(int r, int pack) const { return (row0 + r) / pack; }
  __device__ __forceinline__ int head(int r, int pack) const { return head0 + (row0 + r) % pack; }

  __device__ __forceinline__ int64_t partial_row(const FlashPlan& plan, int r) const {
    return flash_partial_row(plan, sequence.batch, head0 / plan.pack, tiles, tile, parts, part, r);
  }
};

}  // namespace pumice::cuda
