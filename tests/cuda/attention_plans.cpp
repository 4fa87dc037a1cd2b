// Properties of the plans of flash_forward, over many shapes and devices, and its offsets beyond
// 2^31 elements; prints what does not hold.
#include <cstdio>
#include <set>

#include "cuda/attention/flash_tiles.h"

using namespace pumice;
using namespace pumice::cuda;

namespace {

int failures = 0;

void expect(bool holds, const char* what, int64_t q, int64_t k, int64_t heads) {
  if (holds) return;
  ++failures;
  std::printf("%s does not hold for S_q=%ld S_k=%ld heads=%ld\n", what, long(q), long(k),
              long(heads));
}

AttentionProblem problem_of(int64_t batch, int64_t q, int64_t k, int64_t heads, int64_t kv_heads,
                            DType dtype = DType::kBFloat16, int64_t dim = 128) {
  AttentionProblem problem{};
  problem.dtype = dtype;
  problem.batch = batch;
  problem.heads = heads;
  problem.kv_heads = kv_heads;
  problem.head_dim = problem.value_dim = dim;
  problem.max_q = q;
  problem.max_k = k;
  problem.total_q = batch * q;
  problem.total_k = batch * k;
  return problem;
}

int serving(const FlashPlans& plans, int32_t q_len) {
  int count = 0;
  for (int i = 0; i < plans.count; ++i) count += plans.plan[i].serves(q_len);
  return count;
}

const FlashPlan& plan_for(const FlashPlans& plans, int32_t q_len) {
  return plans.plan[0].serves(q_len) || plans.count == 1 ? plans.plan[0] : plans.plan[1];
}

// Blocks, slabs and the merge have room for every sequence of a packed call; and what is decided of
// a sequence is what a call with it alone decides.
void check_sequence(const AttentionProblem& call, const FlashPlans& plans, int32_t q, int32_t k,
                    int sm_count) {
  expect(serving(plans, q) == 1, "one plan serves each sequence", q, k, call.heads);
  const FlashPlan& plan = plan_for(plans, q);
  const int32_t tiles = plan.tiles(q), parts = flash_parts(plan, call.mask, q, k);
  expect(int64_t{tiles} * plan.tile_rows >= int64_t{q} * plan.pack, "tiles cover the rows", q, k,
         call.heads);
  expect(tiles * parts <= plan.items, "blocks for every tile and part", q, k, call.heads);
  if (parts > 1) {
    expect(k / parts >= plan.min_keys && plan.min_keys >= 256, "no short part", q, k, call.heads);
    expect(tiles * parts * plan.grid_heads <= plan.slots, "parts run at once", q, k, call.heads);
    expect(tiles * parts * plan.grid_heads <= plan.slab_items, "room for partial results", q, k,
           call.heads);
    expect(std::min<int64_t>(q * plan.pack, plan.tile_rows) <= plan.slab_rows, "room for the rows",
           q, k, call.heads);
    expect(int64_t{q} * call.heads <= flash_merged_rows(plan, call), "the merge reaches all rows",
           q, k, call.heads);
  }
  AttentionProblem alone = call;
  alone.batch = 1;
  alone.cu_seqlens_q = nullptr;
  alone.max_q = q;
  alone.max_k = k;
  const FlashPlans own = plan_flash_calls(alone, sm_count);
  const FlashPlan& own_plan = plan_for(own, q);
  expect(own_plan.tile_rows == plan.tile_rows && flash_parts(own_plan, call.mask, q, k) == parts,
         "a sequence is cut alike in every batch", q, k, call.heads);
}

// Every row of every part has a place of its own.
void check_partial_rows(const FlashPlan& plan, int32_t q, int32_t k, const AttentionMask& mask) {
  const int32_t tiles = plan.tiles(q), parts = flash_parts(plan, mask, q, k);
  if (parts == 1) return;
  std::set<int64_t> places;
  int64_t count = 0;
  for (int64_t batch = 0; batch < 2; ++batch) {
    for (int32_t head = 0; head < plan.grid_heads; ++head) {
      for (int32_t tile = 0; tile < tiles; ++tile) {
        const int32_t rows = std::min(plan.tile_rows, q * plan.pack - tile * plan.tile_rows);
        for (int32_t part = 0; part < parts; ++part) {
          for (int32_t row = 0; row < rows; ++row) {
            const int64_t place =
                flash_partial_row(plan, batch, head, tiles, tile, parts, part, row);
            expect(place >= 0 && place < flash_partial_rows(plan, 2), "inside the slab", q, k,
                   head);
            places.insert(place);
            ++count;
          }
        }
      }
    }
  }
  expect(static_cast<int64_t>(places.size()) == count, "places differ", q, k, plan.grid_heads);
}

// Parts follow each other, from the first block to the last, and none has much more than its share
// of the blocks that may be visible.
void check_parts(const AttentionMask& mask, int32_t q, int32_t k, int32_t parts) {
  const MaskView view = mask_view(mask, 0, 0, q, k);
  const BlockWalk walk = view.keys_of(0, q, 64);
  const auto blocks = [&](int32_t begin, int32_t end) {
    int32_t count = 0;
    for (int32_t n = walk.next(begin); n < end; n = walk.next(n + 1)) ++count;
    return count;
  };
  const int32_t all = blocks(0, walk.block_end());
  int32_t previous = 0;
  for (int32_t part = 0; part <= parts; ++part) {
    const int32_t begin = flash_part_begin(walk, part, parts);
    expect(begin >= previous, "parts in order", q, k, part);
    expect(part == 0 || walk.count > 0 || blocks(previous, begin) <= all / parts + 1,
           "parts of equal work", q, k, part);
    previous = begin;
  }
  expect(flash_part_begin(walk, 0, parts) == 0 && previous == walk.block_end(),
         "parts cover all keys", q, k, parts);
}

void check_offsets() {
  // 3 sequences of 2^20 tokens, 16 heads of 128: 2^31 elements each.
  AttentionProblem problem = problem_of(3, 1 << 20, 1 << 20, 16, 16);
  const TokenView view = {nullptr, int64_t{1} << 31, 16 * 128, 128};
  const int64_t last = (1 << 20) - 1;
  const FlashSequence sequence = flash_sequence(problem, 2);
  const int64_t expected = 2 * (int64_t{1} << 31) + last * 2048 + 15 * 128;
  expect(token_offset(view, 2, 0, last, 15) == expected, "offset of a token", last, last, 15);
  expect(result_offset(problem, sequence, last, 15, 128) == expected, "offset of a result", last,
         last, 15);
  // Heads a stride of 2^31 apart, and a token stride beyond 2^31 by itself.
  const TokenView apart = {nullptr, 0, (int64_t{1} << 31) + 8, int64_t{1} << 33};
  expect(token_offset(apart, 0, 5, 7, 3) == 12 * ((int64_t{1} << 31) + 8) + 3 * (int64_t{1} << 33),
         "offset with large strides", 5, 7, 3);
  problem = problem_of(40, 1 << 20, 1 << 20, 128, 128);
  expect(lse_offset(problem, flash_sequence(problem, 39), last, 127) ==
             ((int64_t{39} * 128 + 127) << 20) + last,
         "offset of an lse", last, last, 127);
  const int32_t cu_q[] = {0, 1 << 29, (1 << 30) + 5}, cu_k[] = {0, 3, 9};
  problem.cu_seqlens_q = cu_q;
  problem.cu_seqlens_k = cu_k;
  problem.max_q = kMaxSequence;
  problem.total_q = (1 << 30) + 5;
  const FlashSequence packed = flash_sequence(problem, 1);
  expect(packed.k_begin == 3 && packed.k_len == 6 && packed.q_begin == 1 << 29, "packed lengths",
         packed.q_len, packed.k_len, 0);
  expect(lse_offset(problem, packed, 4, 127) == int64_t{127} * problem.total_q + (1 << 29) + 4,
         "offset of a packed lse", 4, 0, 127);
  expect(
      result_offset(problem, packed, 4, 127, 256) == (((int64_t{1} << 29) + 4) * 128 + 127) * 256,
      "offset of a packed result", 4, 0, 127);
  FlashPlan plan{};
  plan.slab_items = 264;
  plan.slab_rows = 128;
  expect(flash_partial_row(plan, 1 << 20, 31, 2, 1, 4, 3, 127) * 256 ==
             (((int64_t{1} << 20) * 264 + 255) * 128 + 127) * 256,
         "offset of a partial result", 0, 0, 31);
}

template <class Tile>
void check_resident() {
  // An SM of a Hopper has 228 KB, one of an Ampere 164, and takes 1 KB for each block.
  expect(Tile::kBlocksPerSm * (Tile::kSharedBytes + 1024) <= 228 * 1024, "blocks on an SM",
         Tile::kRows, Tile::kKeys, Tile::kHeadDim);
}

}  // namespace

int main() {
  for (const int sm_count : {4, 80, 108, 132, 142}) {
    for (const auto& [heads, kv_heads] : {std::pair{1, 1}, {8, 1}, {32, 8}, {32, 32}, {71, 1}}) {
      for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
        for (const int64_t max_q : {1, 2, 16, 17, 130, 4096}) {
          for (const int64_t max_k : {1, 300, 1024, 9000, 100000}) {
            AttentionProblem problem = problem_of(3, max_q, max_k, heads, kv_heads, dtype);
            const auto q = static_cast<int32_t>(max_q), k = static_cast<int32_t>(max_k);
            check_sequence(problem, plan_flash_calls(problem, sm_count), q, k, sm_count);
            const int32_t cu[] = {0, 0, 0, 0};
            problem.cu_seqlens_q = problem.cu_seqlens_k = cu;
            for (const bool window : {false, true}) {
              problem.mask.window_left = window ? 1000 : kUnboundedWindow;
              problem.mask.causal = window;
              const FlashPlans plans = plan_flash_calls(problem, sm_count);
              for (int32_t q_len = q; q_len >= 1; q_len = q_len * 2 / 3) {
                for (int32_t k_len = k; k_len >= 1; k_len /= 3) {
                  check_sequence(problem, plans, q_len, k_len, sm_count);
                }
              }
              if (max_q <= 130 && heads <= 32) {
                check_partial_rows(plan_for(plans, q), q, k, problem.mask);
              }
            }
          }
        }
      }
    }
  }
  AttentionMask mask;
  const int32_t listed[] = {5, 700, 3000};
  for (int kind = 0; kind < 5; ++kind) {
    mask = {};
    mask.causal = kind == 1 || kind == 2;
    if (kind >= 2) mask.window_left = 900;
    if (kind == 3) mask.window_right = 100;
    if (kind == 2) mask.sink_tokens = 4;
    if (kind == 3) mask.global_tokens = 200;
    if (kind == 4) mask.global_index = listed, mask.global_count = 3;
    for (const int32_t q : {1, 60, 5000}) {
      for (const int32_t k : {1, 64, 777, 5000, 40000}) {
        for (const int32_t parts : {1, 2, 7, 32}) check_parts(mask, q, k, parts);
      }
    }
  }
  check_offsets();
  check_resident<FlashTile64>();
  check_resident<FlashTile96>();
  check_resident<FlashTile128>();
  check_resident<FlashTile192>();
  check_resident<FlashTile256>();
  check_resident<FlashShort64>();
  check_resident<FlashShort128>();
  check_resident<FlashShort256>();
  // What the design rests on, on an H200: decoding fills the device, a long prompt is not cut.
  AttentionProblem decode = problem_of(1, 1, 8192, 32, 8);
  const FlashPlan plan = plan_flash_calls(decode, 132).plan[0];
  expect(plan.tile_rows == kFlashShortRows && flash_blocks(plan, 1) >= 132, "decoding is cut", 1,
         8192, 32);
  const FlashPlan prompt = plan_flash_calls(problem_of(1, 8192, 8192, 32, 8), 132).plan[0];
  expect(prompt.slab_items == 0, "a prompt is not cut", 8192, 8192, 32);
  return failures == 0 ? 0 : 1;
}
