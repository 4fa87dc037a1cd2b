// From products to scores, where that takes more than a factor, and to -∞ where a key is hidden.
//
// A warp's products lie as the mma leaves them (flash_softmax.h). The kernel tells a lane's rows by
// numbers r: row tile r / 2, half r % 2.
#pragma once

#include "cuda/attention/flash_schedule.h"
#include "cuda/attention/flash_softmax.h"
#include "cuda/ptx/thread.h"

namespace pumice::cuda {

// tanh by 2^x, to 2^-22 absolutely: softcap · 2^-22 is far below what 16-bit operands leave.
__device__ __forceinline__ float tanh_by_exp2(float x) {
  return 1.0f - __fdividef(2.0f, 1.0f + ptx::exp2_approx(x * (2.0f * kLog2E)));
}

// Whether scores are products times their scale (the rule's, and the keys' own); one that is not
// positive would turn the order of the scores around, on which the softmax's maximum rests.
__device__ __forceinline__ bool score_is_scaled_product(const ScoreRule& rule, float scale) {
  return rule.softcap == 0.0f && rule.alibi_slopes == nullptr && scale > 0.0f;
}

// Where a thread stands among a tile's rows and keys. Asked for where it is needed: what follows
// from it is then worked out there, and takes no register in the rest of the main loop.
template <class Tile>
struct ThreadPlace {
  int lane, warp_row, warp_key;

  __device__ __forceinline__ ThreadPlace() {
    const int thread = ptx::thread_index_here(), warp = thread / kWarpSize;
    lane = thread % kWarpSize;
    warp_row = warp / Tile::kWarpsKeys * Tile::kWarpRows;
    warp_key = warp % Tile::kWarpsKeys * Tile::kWarpKeys;
  }
  // Of the tile's rows, number r of the thread.
  __device__ __forceinline__ int row(int r) const {
    return warp_row + r / 2 * 16 + r % 2 * 8 + lane / 4;
  }
  // Of the warp's keys, number e of the thread in key tile n.
  __device__ __forceinline__ int column(int n, int e) const { return n * 8 + lane % 4 * 2 + e; }
};

// Products to scores in base 2: softmax_scale, softcap, then ALiBi. j0: the key of the warp's first
// column.
template <class Tile>
__device__ __forceinline__ void apply_score_rule(float (&s)[Tile::kRowTiles][Tile::kKeyTiles][4],
                                                 const FlashForward& call, const FlashWork& work,
                                                 float softmax_scale, int j0) {
  const ScoreRule& rule = call.problem.score;
  const float cap = rule.softcap * kLog2E, per_cap = softmax_scale / rule.softcap;
  const float scale = softmax_scale * kLog2E;
#pragma unroll
  for (int r = 0; r < Tile::kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < Tile::kKeyTiles; ++n) {
      __syncwarp();  // one after the other: the registers are full
#pragma unroll
      for (float& x : s[r][n]) {
        x = rule.softcap > 0.0f ? cap * tanh_by_exp2(x * per_cap) : x * scale;
      }
    }
  }
  if (rule.alibi_slopes == nullptr) return;
  const ThreadPlace<Tile> place;
#pragma unroll
  for (int r = 0; r < 2 * Tile::kRowTiles; ++r) {
    const int row = place.row(r), pack = call.plan.pack;
    const float slope =
        kLog2E *
        rule.alibi_slopes[work.sequence.batch * rule.alibi_batch_stride + work.head(row, pack)];
    // The bias depends on the distance alone.
    const int distance = work.query(row, pack) + work.sequence.k_len - work.sequence.q_len - j0;
#pragma unroll
    for (int n = 0; n < Tile::kKeyTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        s[r / 2][n][r % 2 * 2 + e] += alibi_bias(slope, distance, place.column(n, e));
      }
    }
  }
}

// The keys that a row sees where neither bits nor globals are at play: those up to `last`, from
// `first` on or before `prefix`.
struct RowInterval {
  int first, last, prefix;

  __device__ __forceinline__ RowInterval(const MaskView& mask, int i) {
    const int p = mask.position(i);
    first = p - mask.window_left;
    last = min(min(p + mask.window_right, mask.k_len - 1), mask.causal ? p : kUnboundedWindow);
    prefix = mask.sink_tokens;
  }
  __device__ __forceinline__ bool has(int j) const {
    return j <= last && (j >= first || j < prefix);
  }
};

__device__ __forceinline__ bool rows_see_intervals(const MaskView& mask) {
  return mask.bits == nullptr && mask.global_tokens == 0 && mask.global_count == 0;
}

// Which of a lane's scores are hidden, a bit each: r · 2 kKeyTiles + 2n + e. As bits, for a block
// at the edge of a mask must not take registers from those that are not.
template <class Tile>
__device__ __forceinline__ uint64_t hidden_scores(const MaskView& mask, const FlashWork& work,
                                                  int pack, int j0) {
  const ThreadPlace<Tile> place;
  constexpr int kColumns = 2 * Tile::kKeyTiles, kRows = 2 * Tile::kRowTiles;
  static_assert(kRows * kColumns <= 64);
  uint64_t hidden = 0;
  if (rows_see_intervals(mask)) {
#pragma unroll 1
    for (int r = 0; r < kRows; ++r) {
      const RowInterval row(mask, work.query(place.row(r), pack));
      uint32_t bits = 0;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        bits |= row.has(j0 + place.column(c / 2, c % 2)) ? 0u : 1u << c;
      }
      hidden |= uint64_t{bits} << (r * kColumns);
    }
    return hidden;
  }
#pragma unroll 1
  for (int bit = 0; bit < kRows * kColumns; ++bit) {
    // Rows past the tile's end have a query, too, though nobody asks for its result.
    const int row = min(place.row(bit / kColumns), work.rows - 1);
    const int j = j0 + place.column(bit % kColumns / 2, bit % 2);
    if (j >= mask.k_len || !mask.visible(work.query(row, pack), j)) hidden |= uint64_t{1} << bit;
  }
  return hidden;
}

template <class Tile>
__device__ __forceinline__ void hide_scores(float (&s)[Tile::kRowTiles][Tile::kKeyTiles][4],
                                            uint64_t hidden) {
#pragma unroll
  for (int r = 0; r < 2 * Tile::kRowTiles; ++r) {
#pragma unroll
    for (int c = 0; c < 2 * Tile::kKeyTiles; ++c) {
      float& x = s[r / 2][c / 2][r % 2 * 2 + c % 2];
      x = hidden >> (r * 2 * Tile::kKeyTiles + c) & 1 ? -INFINITY : x;
    }
  }
}

}  // namespace pumice::cuda
