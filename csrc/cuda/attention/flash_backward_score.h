// What the kernels of flash_backward do with scores: which are hidden, and P from products.
//
// A warp's products lie as the mma leaves them: lane 4g + t holds, of rows g and g + 8 of each row
// tile, columns 2t and 2t + 1 of each column tile. Element e of row tile r and column tile n has
// number (r · kColumnTiles + n) · 4 + e.
#pragma once

#include "cuda/attention/flash_backward.h"
#include "cuda/attention/flash_score.h"
#include "cuda/attention/shared_tile.h"
#include "cuda/ptx/thread.h"

namespace pumice::cuda {

template <int kRowTiles, int kColumnTiles>
using Scores = float[kRowTiles][kColumnTiles][4];

// From products to P = 2^(score - lse2).
struct FlashGradRule {
  float scale_log2;         // softmax_scale · log2(e)
  float per_cap, cap_log2;  // softmax_scale / softcap and softcap · log2(e), or 0
  float slope_log2;         // ALiBi's slope · log2(e), or 0
  bool scaled;              // whether scores are products times a factor that is not zero

  __device__ __forceinline__ FlashGradRule(const ScoreRule& rule, int64_t batch, int head) {
    const bool capped = rule.softcap > 0.0f, biased = rule.alibi_slopes != nullptr;
    scale_log2 = rule.softmax_scale * kLog2E;
    per_cap = capped ? rule.softmax_scale / rule.softcap : 0.0f;
    cap_log2 = capped ? rule.softcap * kLog2E : 0.0f;
    slope_log2 = biased ? rule.alibi_slopes[batch * rule.alibi_batch_stride + head] * kLog2E : 0.0f;
    scaled = !capped && !biased && scale_log2 != 0.0f;
  }

  // If scaled.
  __device__ __forceinline__ float scaled_probability(float product, float lse2) const {
    return ptx::exp2_approx(product * scale_log2 - lse2);
  }
  // A product whose probability is 0.
  __device__ __forceinline__ float hidden_product() const {
    return scale_log2 > 0.0f ? -INFINITY : INFINITY;
  }

  // In any case. slope: f' / softmax_scale.
  __device__ __forceinline__ float probability(float product, float lse2, int distance,
                                               float& slope) const {
    float score = product * scale_log2;
    slope = 1.0f;
    if (cap_log2 > 0.0f) {
      const float t = tanh_by_exp2(product * per_cap);
      score = cap_log2 * t;
      slope = 1.0f - t * t;
    }
    return ptx::exp2_approx(score - slope_log2 * fabsf(static_cast<float>(distance)) - lse2);
  }
};

// One head of one sequence, and one side of its score matrix; in shared memory, for it would take
// some 50 registers.
struct FlashGradHead {
  FlashSequence sequence;
  MaskView mask;
  FlashGradRule rule;
  BlockWalk walk;
  int end;  // of the walk
  int head, kv_head;
  int last_head;  // of those that share the KV head

  int first;        // key, or query, of the block's tile
  int upcoming[2];  // blocks of the walk, for steps to come

  __device__ __forceinline__ FlashGradHead(const AttentionProblem& problem,
                                           const FlashSequence& sequence, int head, int first)
      : sequence(sequence),
        mask(mask_view(problem.mask, sequence.batch, head, sequence.q_len, sequence.k_len)),
        rule(problem.score, sequence.batch, head),
        head(head),
        kv_head(head / static_cast<int>(problem.group())),
        last_head((kv_head + 1) * static_cast<int>(problem.group()) - 1),
        first(first) {}
};

// A lane's row (of 16 · kRowTiles) and column of element (r, n, e).
__device__ __forceinline__ int element_row(int lane, int r, int e) {
  return r * 16 + e / 2 * 8 + lane / 4;
}
__device__ __forceinline__ int element_column(int lane, int n, int e) {
  return n * 8 + lane % 4 * 2 + e % 2;
}
// Read anew where it is used, not kept in a register from the kernel's beginning.
__device__ __forceinline__ int lane_here() { return ptx::thread_index_here() % kWarpSize; }

// The hidden ones of a lane's scores, as bits by number. query_of(row, column) and key_of(row,
// column) say what an element is of; both may lie beyond the sequence's end. Loops, for this is
// rare: only at the edges of a mask, and unrolled it would be longer than all the rest.
template <int kRowTiles, int kColumnTiles, class QueryOf, class KeyOf>
__device__ __forceinline__ uint64_t hidden_elements(const MaskView& mask, QueryOf&& query_of,
                                                    KeyOf&& key_of) {
  static_assert(kRowTiles * kColumnTiles * 4 <= 64);
  const bool intervals = rows_see_intervals(mask);
  const int lane = lane_here();
  uint64_t hidden = 0;
#pragma unroll 1
  for (int n = 0; n < kColumnTiles; ++n) {
    if (intervals) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          const int row = element_row(lane, r, e), column = element_column(lane, n, e);
          const int i = query_of(row, column);
          const RowInterval interval(mask, i);
          const bool sees = i < mask.q_len && interval.has(key_of(row, column));
          hidden |= static_cast<uint64_t>(!sees) << ((r * kColumnTiles + n) * 4 + e);
        }
      }
    } else {
#pragma unroll 1
      for (int re = 0; re < kRowTiles * 4; ++re) {
        const int r = re / 4, e = re % 4;
        const int row = element_row(lane, r, e), column = element_column(lane, n, e);
        const int i = query_of(row, column), j = key_of(row, column);
        const bool sees = i < mask.q_len && j < mask.k_len && mask.visible(i, j);
        hidden |= static_cast<uint64_t>(!sees) << ((r * kColumnTiles + n) * 4 + e);
      }
    }
  }
  return hidden;
}

template <int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void set_zero(Scores<kRowTiles, kColumnTiles>& s) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[r][n][e] = 0.0f;
    }
  }
}

template <int kColumnTiles>
__device__ __forceinline__ bool is_hidden(uint64_t hidden, int r, int n, int e) {
  return (hidden >> ((r * kColumnTiles + n) * 4 + e) & 1) != 0;
}

template <int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void set_hidden(Scores<kRowTiles, kColumnTiles>& s, uint64_t hidden,
                                           float value) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (is_hidden<kColumnTiles>(hidden, r, n, e)) s[r][n][e] = value;
      }
    }
  }
}

// Column tiles 2k and 2k + 1, given as fp32, become an A operand of 16 columns in the registers of
// column tile 2k: one array is scores before and operands after, for the two warps of a pair change
// over at different times, and as two arrays both would be kept.
template <class T, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void set_operand(Scores<kRowTiles, kColumnTiles>& s, int r, int k,
                                            const float (&x)[2][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    s[r][2 * k][i] = __uint_as_float(pack_pair<T>(x[i / 2][i % 2 * 2], x[i / 2][i % 2 * 2 + 1]));
  }
}
template <int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void get_operand(const Scores<kRowTiles, kColumnTiles>& s, int r, int k,
                                            uint32_t (&operand)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) operand[i] = __float_as_uint(s[r][2 * k][i]);
}

template <class T>
__device__ __forceinline__ float2 unpack_pair(uint32_t pair) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(bits_as<__half2>(pair));
  } else {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  }
}

// s += A·Bᵀ over `columns` of both tiles, rounded up to a multiple of 32 (there are zeros).
template <class T, class ATile, class BTile, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void add_product(Scores<kRowTiles, kColumnTiles>& s,
                                            const unsigned char* a_tile, int a_row,
                                            const unsigned char* b_tile, int b_row, int columns) {
  const int lane = lane_here();
#pragma unroll 1
  for (int k0 = 0; 16 * k0 < columns; k0 += 2) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r)
        ATile::load_a(a[r], a_tile, a_row + r * 16, k0 + step, lane);
#pragma unroll
      for (int n = 0; n < kColumnTiles / 2; ++n) {
        uint32_t b[2][2];
        BTile::load_b(b, b_tile, b_row + n * 16, k0 + step, lane);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          mma_16bit<T>(s[r][2 * n], a[r], b[0]);
          mma_16bit<T>(s[r][2 * n + 1], a[r], b[1]);
        }
      }
    }
  }
}

// sums += A·B, A being operands as set_operand leaves them, for the first `columns` of B, rounded
// up to a multiple of 32.
template <class T, class BTile, int kRowTiles, int kColumnTiles, int kKTiles>
__device__ __forceinline__ void add_operand_product(Scores<kRowTiles, kColumnTiles>& sums,
                                                    const Scores<kRowTiles, kKTiles>& operands,
                                                    const unsigned char* b_tile, int b_row,
                                                    int columns) {
  constexpr int kGroup = 4;  // column tiles
  const int lane = lane_here();
#pragma unroll
  for (int group = 0; group < kColumnTiles / kGroup; ++group) {
    if (group * kGroup * 8 >= columns) break;
#pragma unroll
    for (int k = 0; k < kKTiles / 2; ++k) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) get_operand(operands, r, k, a[r]);
#pragma unroll
      for (int n = group * kGroup; n < (group + 1) * kGroup; n += 2) {
        uint32_t b[2][2];
        BTile::load_b_transposed(b, b_tile, b_row + k * 16, n / 2, lane);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          mma_16bit<T>(sums[r][n], a[r], b[0]);
          mma_16bit<T>(sums[r][n + 1], a[r], b[1]);
        }
      }
    }
  }
}

// Stores the first `columns` of factor · sums to the rows of a contiguous gradient, whose row r
// begins at gradient + row_offset(r); rows that it has are those below `rows`.
template <class T, int kRowTiles, int kColumnTiles, class RowOffset>
__device__ __forceinline__ void store_gradient(const Scores<kRowTiles, kColumnTiles>& sums,
                                               float factor, void* gradient, int rows, int columns,
                                               RowOffset&& row_offset) {
  const int lane = lane_here();
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = element_row(lane, r, 2 * half);
      if (row >= rows) continue;
      T* to = static_cast<T*>(gradient) + row_offset(row);
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        const int column = element_column(lane, n, 0);
        const float x = sums[r][n][2 * half] * factor, y = sums[r][n][2 * half + 1] * factor;
        if (columns % 2 == 0) {  // then a pair is whole, and on a boundary of 4 bytes
          if (column < columns) *reinterpret_cast<uint32_t*>(to + column) = pack_pair<T>(x, y);
        } else {
          if (column < columns) to[column] = from_float<T>(x);
          if (column + 1 < columns) to[column + 1] = from_float<T>(y);
        }
      }
    }
  }
}

}  // namespace pumice::cuda
