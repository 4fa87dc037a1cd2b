// kernel flash_backward_queries: grad_query of a tile of queries of one head, summed over the keys
// that one of them may see.
//
//     S = query·keyᵀ,  dP = grad_out·valueᵀ,  dS = 2^(S - lse2)·(dP - delta),  grad_query += dS·key
//
// Warps are along the queries and, two of them, along the keys of a tile: each adds up its keys'
// part of grad_query, and at the end one adds the other's. dS is an operand as it lies, so that
// warps meet only at one barrier a tile; a tile's keys and values are copied while the one before
// is multiplied.
#pragma once

#include "cuda/attention/flash_backward_score.h"
#include "cuda/attention/flash_backward_tiles.h"
#include "cuda/launch.h"

namespace pumice::cuda {

// One block. What it works on lies in shared memory (FlashGradHead), for sums and scores leave few
// registers.
template <class T, class Tile>
class FlashGradQueries {
 public:
  using Queries = SharedTile<Tile::kQueries, Tile::kHeadDim>;
  using Keys = SharedTile<Tile::kKeys, Tile::kHeadDim>;
  static constexpr int kRowTiles = Tile::kRowTiles;
  static constexpr int kKeyTiles = Tile::kWarpKeys / 8;
  static constexpr int kDimTiles = Tile::kHeadDim / 8;

  explicit __device__ __forceinline__ FlashGradQueries(const FlashBackward& call)
      : call_(call), shared_(dynamic_shared_memory<unsigned char>()) {}

  __device__ __forceinline__ void run(const FlashSequence& sequence, int h, int m0) {
    if (threadIdx.x == 0) {
      head() = FlashGradHead(call_.problem, sequence, h, m0);
      const int last = min(m0 + Tile::kQueries, sequence.q_len);
      head().walk = head().mask.keys_of(m0, last, Tile::kKeys);
      head().end = head().walk.block_end();
      head().upcoming[0] = next(0);
      head().upcoming[1] = next(head().upcoming[0] + 1);
    }
    __syncthreads();
    copy_queries();
    int n = head().upcoming[0], stage = 0;
    if (n < head().end) copy_keys(n, 0);
#pragma unroll 1
    while (n < head().end) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // this tile is there, and nobody reads the one before
      const int following = head().upcoming[stage ^ 1];
      if (following < head().end) copy_keys(following, stage ^ 1);
      if (threadIdx.x == 0) head().upcoming[stage] = next(following + 1);
      add_keys(n * Tile::kKeys, stage);
      stage ^= 1;
      n = following;
    }
    ptx::cp_async_wait<0>();
    add_warps();
    if (is_first_of_row(ptx::thread_index_here() / kWarpSize)) store();
  }

 private:
  __device__ __forceinline__ FlashGradHead& head() const {
    return *reinterpret_cast<FlashGradHead*>(shared_ + Tile::kHeadOffset);
  }
  __device__ __forceinline__ const FlashSequence& sequence() const { return head().sequence; }
  __device__ __forceinline__ unsigned char* stage_at(int stage) const {
    return shared_ + Tile::kStageOffset + stage * Tile::kStageBytes;
  }
  // Of the tile's queries and of the keys of a step, a warp's first.
  static __device__ __forceinline__ int row_of_warp(int warp) {
    return warp / Tile::kKeyWarps * Tile::kWarpQueries;
  }
  static __device__ __forceinline__ int key_of_warp(int warp) {
    return warp % Tile::kKeyWarps * Tile::kWarpKeys;
  }
  static __device__ __forceinline__ bool is_first_of_row(int warp) {
    return warp % Tile::kKeyWarps == 0;
  }

  // The first tile of keys not before tile n that has a visible element.
  __device__ __forceinline__ int next(int n) const {
    BlockWalk walk = head().walk;
    walk.block = Tile::kKeys;  // as it is, but known to the compiler, which divides by it
    const int m0 = head().first;
    return head().mask.next_keys(walk, m0, min(m0 + Tile::kQueries, head().mask.q_len), n);
  }

  __device__ __forceinline__ void copy_queries() const {
    const int m0 = head().first, thread = ptx::thread_index_here();
    const auto copy = [&](unsigned char* to, const TokenView& view, int columns) {
      Queries::template copy_strided<Tile::kThreads>(
          to, thread, sequence().q_len - m0, columns,
          static_cast<const unsigned char*>(view.data) +
              2 * token_offset(view, sequence().batch, sequence().q_begin, m0, head().head),
          2 * view.token_stride);
    };
    copy(shared_, call_.problem.query, call_.key_columns);
    copy(shared_ + Tile::kQueryBytes, call_.grad_out, call_.value_columns);
    if (thread < Tile::kQueries) {
      ptx::cp_async_8(shared_ + Tile::kRowOffset + thread * sizeof(FlashGradRow),
                      call_.rows + lse_offset(call_.problem, sequence(), m0 + thread, head().head),
                      m0 + thread < sequence().q_len);
    }
    ptx::cp_async_commit();
  }

  __device__ __forceinline__ void copy_keys(int n, int stage) const {
    const int n0 = n * Tile::kKeys;

    const auto copy = [&](unsigned char* to, const TokenView& view, int columns) {
      Keys::template copy_strided<Tile::kThreads>(
          to, ptx::thread_index_here(), sequence().k_len - n0, columns,
          static_cast<const unsigned char*>(view.data) +
              2 * token_offset(view, sequence().batch, sequence().k_begin, n0, head().kv_head),
          2 * view.token_stride);
    };
    copy(stage_at(stage), call_.problem.key, call_.key_columns);
    copy(stage_at(stage) + Tile::kKeyBytes, call_.problem.value, call_.value_columns);
    ptx::cp_async_commit();
  }

  __device__ __forceinline__ void add_keys(int n0, int stage) {
    const int warp = ptx::thread_index_here() / kWarpSize;
    const int warp_row = row_of_warp(warp), warp_key = key_of_warp(warp);
    const unsigned char* keys = stage_at(stage);
    // Before there are scores, which leave few registers.
    const uint64_t hidden = hidden_scores(warp_row, n0 + warp_key);
    Scores<kRowTiles, kKeyTiles> p, dp;
    set_zero(p);
    add_product<T, Queries, Keys>(p, shared_, warp_row, keys, warp_key, call_.key_columns);
    make_sloped_probabilities(p, hidden, warp_row, n0 + warp_key);
    set_zero(dp);
    add_product<T, Queries, Keys>(dp, shared_ + Tile::kQueryBytes, warp_row, keys + Tile::kKeyBytes,
                                  warp_key, call_.value_columns);
    const FlashGradRow* rows = rows_of_lane(warp_row, lane_here());
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const float delta[2] = {rows[r * 16].delta, rows[r * 16 + 8].delta};
#pragma unroll
      for (int k = 0; k < kKeyTiles / 2; ++k) {
        float ds[2][4];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int n = 2 * k + i / 4, e = i % 4;
          ds[i / 4][e] = p[r][n][e] * (dp[r][n][e] - delta[e / 2]);
        }
        set_operand<T>(p, r, k, ds);
      }
    }
    add_operand_product<T, Keys>(sums_, p, keys, warp_key, call_.key_columns);
  }

  // lse2 and delta of a lane's row 0; those of row tile r and half h are 16 · r + 8 · h on.
  __device__ __forceinline__ const FlashGradRow* rows_of_lane(int warp_row, int lane) const {
    return reinterpret_cast<const FlashGradRow*>(shared_ + Tile::kRowOffset) + warp_row + lane / 4;
  }

  // The hidden ones of a warp's scores. j0: its first key.
  __device__ __forceinline__ uint64_t hidden_scores(int warp_row, int j0) const {
    const MaskView& mask = head().mask;
    const int i0 = head().first + warp_row;
    if (mask.sees_all(i0, i0 + Tile::kWarpQueries, j0, j0 + Tile::kWarpKeys)) return 0;
    return hidden_elements<kRowTiles, kKeyTiles>(
        mask, [&](int row, int /*column*/) { return i0 + row; },
        [&](int /*row*/, int column) { return j0 + column; });
  }

  // From products to P, times the slope of softcap where there is one.
  __device__ __forceinline__ void make_sloped_probabilities(Scores<kRowTiles, kKeyTiles>& s,
                                                            uint64_t hidden, int warp_row,
                                                            int j0) const {
    const FlashGradRule& rule = head().rule;
    const int lane = lane_here();
    const FlashGradRow* rows = rows_of_lane(warp_row, lane);
    const bool scaled = rule.scaled;
    if (scaled && hidden != 0) set_hidden(s, hidden, rule.hidden_product());
    // Of the warp's first query from its first key.
    const int distance = head().mask.position(head().first + warp_row) - j0;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const float lse2[2] = {rows[r * 16].lse2, rows[r * 16 + 8].lse2};
      if (scaled) {
#pragma unroll
        for (int i = 0; i < kKeyTiles * 4; ++i) {
          float& x = s[r][i / 4][i % 4];
          x = rule.scaled_probability(x, lse2[i % 4 / 2]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kKeyTiles * 4; ++i) {
          float& x = s[r][i / 4][i % 4];
          const int apart =
              distance + element_row(lane, r, i % 4) - element_column(lane, i / 4, i % 4);
          float slope;
          x = rule.probability(x, lse2[i % 4 / 2], apart, slope);
          x = is_hidden<kKeyTiles>(hidden, r, i / 4, i % 4) ? 0.0f : x * slope;
        }
      }
    }
  }

  // The sums of the warps along the keys to the first of them, by the memory of the stages.
  __device__ __forceinline__ void add_warps() {
    static_assert(Tile::kKeyWarps == 2);
    const int warp = ptx::thread_index_here() / kWarpSize;
    float4* sums = reinterpret_cast<float4*>(stage_at(0)) +
                   row_of_warp(warp) / 16 * kDimTiles * kWarpSize + lane_here();
    __syncthreads();
    if (!is_first_of_row(warp)) {
#pragma unroll
      for (int i = 0; i < kRowTiles * kDimTiles; ++i) {
        const float (&s)[4] = sums_[i / kDimTiles][i % kDimTiles];
        sums[i * kWarpSize] = {s[0], s[1], s[2], s[3]};
      }
    }
    __syncthreads();
    if (!is_first_of_row(warp)) return;
#pragma unroll
    for (int i = 0; i < kRowTiles * kDimTiles; ++i) {
      float (&s)[4] = sums_[i / kDimTiles][i % kDimTiles];
      const float4 other = sums[i * kWarpSize];
      s[0] += other.x;
      s[1] += other.y;
      s[2] += other.z;
      s[3] += other.w;
    }
  }

  __device__ __forceinline__ void store() const {
    const AttentionProblem& problem = call_.problem;
    const int i0 = head().first + row_of_warp(ptx::thread_index_here() / kWarpSize);
    const int h = head().head;
    store_gradient<T>(sums_, problem.score.softmax_scale, call_.grad_query, sequence().q_len - i0,
                      static_cast<int>(problem.head_dim), [&](int row) {
                        return result_offset(problem, sequence(), i0 + row, h, problem.head_dim);
                      });
  }

  const FlashBackward& call_;
  unsigned char* shared_;
  Scores<kRowTiles, kDimTiles> sums_ = {};
};

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    flash_backward_queries_kernel(const __grid_constant__ FlashBackward call) {
  static_assert(sizeof(FlashGradHead) <= Tile::kHeadBytes);
  const auto blocks = static_cast<int>((call.problem.max_q + Tile::kQueries - 1) / Tile::kQueries);
  const auto block = static_cast<int>(blockIdx.x);
  const auto heads = static_cast<int>(call.problem.heads);
  const FlashSequence sequence = flash_sequence(call.problem, block / blocks / heads);
  // The last queries first: under a causal mask they see most keys.
  const int m0 = (blocks - 1 - block % blocks) * Tile::kQueries;
  if (m0 >= sequence.q_len) return;
  FlashGradQueries<T, Tile>(call).run(sequence, block / blocks % heads, m0);
}

template <class T, class Tile>
void launch_flash_backward_queries(const FlashBackward& call, cudaStream_t stream) {
  const AttentionProblem& problem = call.problem;
  const int64_t blocks =
      (problem.max_q + Tile::kQueries - 1) / Tile::kQueries * problem.heads * problem.batch;
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks <= INT32_MAX, "pumice::flash_attention_backward: ", problem.batch,
                  " sequences of ", problem.max_q, " queries are too many for one launch");
  launch(flash_backward_queries_kernel<T, Tile>, dim3(static_cast<unsigned>(blocks)),
         dim3(Tile::kThreads), Tile::kSharedBytes, stream, call);
}

}  // namespace pumice::cuda
