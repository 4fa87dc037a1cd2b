// kernel flash_backward_keys: grad_key and grad_value of a tile of keys of one KV head, summed over
// the heads that share it and over the queries that may see one of the keys.
//
// Warps go in pairs of equal keys (flash_backward_tiles.h says why). All products are of keys ×
// queries, that is transposed, so that sums of one are operands of the next as they lie:
//
//     warp      first product          between                          second product
//     values    S   = key·queryᵀ       P = 2^(S - lse2), to the other   grad_value += P·grad_out
//     keys      dPᵀ = value·grad_outᵀ  dS = P·(dPᵀ - delta)             grad_key   += dS·query
//
// The two do the same with tiles exchanged, and meet at a barrier, for P, in the middle of a step.
// A step's query and grad_out are copied while the one before is multiplied.
#pragma once

#include "cuda/attention/flash_backward_score.h"
#include "cuda/attention/flash_backward_tiles.h"
#include "cuda/launch.h"

namespace pumice::cuda {

// One block. What it works on lies in shared memory (FlashGradHead): the sums and scores of a step
// leave some 30 registers for all else, so that little is kept across a step.
template <class T, class Tile>
class FlashGradKeys {
 public:
  using Keys = SharedTile<Tile::kKeys, Tile::kHeadDim>;
  using Queries = SharedTile<Tile::kQueries, Tile::kHeadDim>;
  static constexpr int kRowTiles = Tile::kRowTiles;
  static constexpr int kQueryTiles = Tile::kQueries / 8;

  explicit __device__ __forceinline__ FlashGradKeys(const FlashBackward& call)
      : call_(call), shared_(dynamic_shared_memory<unsigned char>()) {}

  __device__ __forceinline__ void run(const FlashSequence& sequence, int kv_head, int n0) {
    if (threadIdx.x == 0) {
      start_head(sequence, kv_head * static_cast<int>(call_.problem.group()), n0);
    }
    __syncthreads();
    copy_keys();
    while (true) {
      add_head();
      if (head().head == head().last_head) break;
      __syncthreads();  // nobody reads the description of this head any more
      if (threadIdx.x == 0) {
        const FlashSequence same = head().sequence;
        start_head(same, head().head + 1, head().first);
      }
      __syncthreads();
    }
    // No copy may be under way when the block ends (where no query sees the keys).
    ptx::cp_async_wait<0>();
    store();
  }

 private:
  __device__ __forceinline__ FlashGradHead& head() const {
    return *reinterpret_cast<FlashGradHead*>(shared_ + Tile::kHeadOffset);
  }
  __device__ __forceinline__ const FlashSequence& sequence() const { return head().sequence; }

  __device__ __forceinline__ unsigned char* stage_at(int stage) const {
    return shared_ + Tile::kStageOffset + stage * Tile::kStageBytes;
  }
  // Of a pair of warps, the one of values; and the pair's first key in the tile.
  static __device__ __forceinline__ bool is_of_values(int warp) { return warp < Tile::kPairs; }
  static __device__ __forceinline__ int key_of_warp(int warp) {
    return warp % Tile::kPairs * Tile::kWarpKeys;
  }

  __device__ __forceinline__ void start_head(const FlashSequence& sequence, int h, int n0) const {
    head() = FlashGradHead(call_.problem, sequence, h, n0);
    const int last = min(n0 + Tile::kKeys, sequence.k_len);
    head().walk = head().mask.queries_of(n0, last, Tile::kQueries);
    head().end = head().walk.block_end();
    head().upcoming[0] = next(0);
    head().upcoming[1] = next(head().upcoming[0] + 1);
  }
  // The first step not before step m that has a visible element.
  __device__ __forceinline__ int next(int m) const {
    BlockWalk walk = head().walk;
    walk.block = Tile::kQueries;  // as it is, but known to the compiler, which divides by it
    const int n0 = head().first;
    return head().mask.next_queries(walk, n0, min(n0 + Tile::kKeys, head().mask.k_len), m);
  }

  __device__ __forceinline__ void copy_keys() const {
    const int n0 = head().first;
    const auto copy = [&](unsigned char* to, const TokenView& view, int columns) {
      Keys::template copy_strided<Tile::kThreads>(
          to, ptx::thread_index_here(), sequence().k_len - n0, columns,
          static_cast<const unsigned char*>(view.data) +
              2 * token_offset(view, sequence().batch, sequence().k_begin, n0, head().kv_head),
          2 * view.token_stride);
    };
    copy(shared_, call_.problem.key, call_.key_columns);
    copy(shared_ + Tile::kKeyBytes, call_.problem.value, call_.value_columns);
    ptx::cp_async_commit();
  }

  __device__ __forceinline__ void copy_queries(int m, int stage) const {
    const int m0 = m * Tile::kQueries, thread = ptx::thread_index_here();
    unsigned char* to = stage_at(stage);
    const auto copy = [&](unsigned char* to, const TokenView& view, int columns) {
      Queries::template copy_strided<Tile::kThreads>(
          to, thread, sequence().q_len - m0, columns,
          static_cast<const unsigned char*>(view.data) +
              2 * token_offset(view, sequence().batch, sequence().q_begin, m0, head().head),
          2 * view.token_stride);
    };
    copy(to, call_.problem.query, call_.key_columns);
    copy(to + Tile::kQueryBytes, call_.grad_out, call_.value_columns);
    if (thread < Tile::kQueries) {
      ptx::cp_async_8(to + 2 * Tile::kQueryBytes + thread * sizeof(FlashGradRow),
                      call_.rows + lse_offset(call_.problem, sequence(), m0 + thread, head().head),
                      m0 + thread < sequence().q_len);
    }
    ptx::cp_async_commit();
  }

  __device__ __forceinline__ void add_head() {
    int m = head().upcoming[0], stage = 0;
    if (m >= head().end) return;
    copy_queries(m, 0);
#pragma unroll 1
    while (m < head().end) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // this step's tiles are there, and nobody reads those of the step before
      if (head().upcoming[stage ^ 1] < head().end) {
        copy_queries(head().upcoming[stage ^ 1], stage ^ 1);
      }
      add_step(m, stage);
      stage ^= 1;
      m = head().upcoming[stage];
    }
  }

  __device__ __forceinline__ void add_step(int m, int stage) {
    const int warp = ptx::thread_index_here() / kWarpSize;
    const bool of_values = is_of_values(warp);
    const unsigned char* query = stage_at(stage);
    const unsigned char* grad_out = query + Tile::kQueryBytes;
    // Both before there are scores, which leave few registers.
    uint64_t hidden = 0;
    if (of_values) {
      hidden = hidden_scores(m * Tile::kQueries, key_of_warp(warp));
    } else if (threadIdx.x == Tile::kThreads / 2) {  // one of those that need not compute P
      head().upcoming[stage] = next(head().upcoming[stage ^ 1] + 1);
    }
    Scores<kRowTiles, kQueryTiles> s;
    set_zero(s);
    add_product<T, Keys, Queries>(s, of_values ? shared_ : shared_ + Tile::kKeyBytes,
                                  key_of_warp(warp), of_values ? query : grad_out, 0,
                                  of_values ? call_.key_columns : call_.value_columns);
    if (of_values) make_probabilities(s, hidden, m * Tile::kQueries, stage, key_of_warp(warp));
    __syncthreads();
    if (!of_values) make_score_gradients(s, stage, key_of_warp(warp));
    add_operand_product<T, Queries>(sums_, s, of_values ? grad_out : query, 0,
                                    of_values ? call_.value_columns : call_.key_columns);
  }

  // What a lane reads and writes between the products of a step.
  struct LaneData {
    int lane;
    // Where the two warps of a pair hand over P: both hold the same elements.
    uint4* exchange;
    // lse2 and delta of columns 2t and 2t + 1 of column tile 0.
    const float4* rows;

    __device__ __forceinline__ LaneData(unsigned char* shared, const unsigned char* stage,
                                        int warp_key) {
      lane = lane_here();
      exchange = reinterpret_cast<uint4*>(shared + Tile::kExchangeOffset) +
                 warp_key / 16 * (kQueryTiles / 2) * kWarpSize + lane;
      rows = reinterpret_cast<const float4*>(stage + 2 * Tile::kQueryBytes) + lane % 4;
    }
    __device__ __forceinline__ uint4& operand(int r, int k) const {
      return exchange[(r * (kQueryTiles / 2) + k) * kWarpSize];
    }
    __device__ __forceinline__ void hand_over(const Scores<kRowTiles, kQueryTiles>& s, int r,
                                              int k) const {
      uint32_t a[4];
      get_operand(s, r, k, a);
      operand(r, k) = {a[0], a[1], a[2], a[3]};
    }
  };

  // The hidden ones of a warp's scores of a step.
  __device__ __forceinline__ uint64_t hidden_scores(int m0, int warp_key) const {
    const MaskView& mask = head().mask;
    const int j0 = head().first + warp_key;
    if (mask.sees_all(m0, m0 + Tile::kQueries, j0, j0 + Tile::kWarpKeys)) return 0;
    return hidden_elements<kRowTiles, kQueryTiles>(
        mask, [&](int /*row*/, int column) { return m0 + column; },
        [&](int row, int /*column*/) { return j0 + row; });
  }

  // P from products, as an operand, and to the other warp, times the slope of softcap.
  __device__ __forceinline__ void make_probabilities(Scores<kRowTiles, kQueryTiles>& s,
                                                     uint64_t hidden, int m0, int stage,
                                                     int warp_key) const {
    const FlashGradRule& rule = head().rule;
    const LaneData mine(shared_, stage_at(stage), warp_key);
    if (rule.scaled) {
      if (hidden != 0) set_hidden(s, hidden, rule.hidden_product());
      for_operands([&](int r, int k) {
        float p[2][4];
        const float4 row[2] = {mine.rows[8 * k], mine.rows[8 * k + 4]};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int n = i / 4, e = i % 4;
          p[n][e] = rule.scaled_probability(s[r][2 * k + n][e], e % 2 == 0 ? row[n].x : row[n].z);
        }
        set_operand<T>(s, r, k, p);
        mine.hand_over(s, r, k);
      });
      return;
    }
    // Of the warp's first query from its first key.
    const int distance = head().mask.position(m0) - head().first - warp_key;
    for_operands([&](int r, int k) {
      float p[2][4], sloped[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float4 row = mine.rows[(2 * k + n) * 4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int apart =
              distance + element_column(mine.lane, 2 * k + n, e) - element_row(mine.lane, r, e);
          float slope;
          p[n][e] = rule.probability(s[r][2 * k + n][e], e % 2 == 0 ? row.x : row.z, apart, slope);
          if (is_hidden<kQueryTiles>(hidden, r, 2 * k + n, e)) p[n][e] = 0.0f;
          sloped[n][e] = p[n][e] * slope;
        }
      }
      set_operand<T>(s, r, k, sloped);
      mine.hand_over(s, r, k);
      set_operand<T>(s, r, k, p);
    });
  }

  // function(row tile, step of 16 queries), step by step, so that scores make room for operands.
  template <class Function>
  static __device__ __forceinline__ void for_operands(Function&& function) {
#pragma unroll
    for (int k = 0; k < kQueryTiles / 2; ++k) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) function(r, k);
    }
  }

  // dS / softmax_scale from dPᵀ, with P (times the slope of softcap) from the other warp.
  __device__ __forceinline__ void make_score_gradients(Scores<kRowTiles, kQueryTiles>& dp,
                                                       int stage, int warp_key) const {
    const LaneData mine(shared_, stage_at(stage), warp_key);
    for_operands([&](int r, int k) {
      const uint4 four = mine.operand(r, k);
      const uint32_t pairs[4] = {four.x, four.y, four.z, four.w};
      float ds[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = i / 2, e = i % 2 * 2;
        const float4 row = mine.rows[(2 * k + n) * 4];
        const float2 p = unpack_pair<T>(pairs[i]);
        ds[n][e] = p.x * (dp[r][2 * k + n][e] - row.y);
        ds[n][e + 1] = p.y * (dp[r][2 * k + n][e + 1] - row.w);
      }
      set_operand<T>(dp, r, k, ds);
    });
  }

  __device__ __forceinline__ void store() const {
    const AttentionProblem& problem = call_.problem;
    const int warp = ptx::thread_index_here() / kWarpSize;
    const bool of_values = is_of_values(warp);
    const int64_t dim = of_values ? problem.value_dim : problem.head_dim;
    const int j0 = head().first + key_of_warp(warp), h = head().kv_head;
    const int64_t token =
        (problem.packed() ? sequence().k_begin : sequence().batch * problem.max_k) + j0;
    store_gradient<T>(sums_, of_values ? 1.0f : problem.score.softmax_scale,
                      of_values ? call_.grad_value : call_.grad_key, sequence().k_len - j0,
                      static_cast<int>(dim),
                      [&](int row) { return ((token + row) * problem.kv_heads + h) * dim; });
  }

  const FlashBackward& call_;
  unsigned char* shared_;
  Scores<kRowTiles, Tile::kHeadDim / 8> sums_ = {};
};

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    flash_backward_keys_kernel(const __grid_constant__ FlashBackward call) {
  static_assert(sizeof(FlashGradHead) <= Tile::kHeadBytes);
  // The first keys first: under a causal mask most queries see them.
  const auto blocks = static_cast<int>((call.problem.max_k + Tile::kKeys - 1) / Tile::kKeys);
  const auto block = static_cast<int>(blockIdx.x);
  const int n0 = block % blocks * Tile::kKeys;
  const auto kv_heads = static_cast<int>(call.problem.kv_heads);
  const FlashSequence sequence = flash_sequence(call.problem, block / blocks / kv_heads);
  if (n0 >= sequence.k_len) return;
  FlashGradKeys<T, Tile>(call).run(sequence, block / blocks % kv_heads, n0);
}

template <class T, class Tile>
void launch_flash_backward_keys(const FlashBackward& call, cudaStream_t stream) {
  const AttentionProblem& problem = call.problem;
  const int64_t blocks =
      (problem.max_k + Tile::kKeys - 1) / Tile::kKeys * problem.kv_heads * problem.batch;
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks <= INT32_MAX, "pumice::flash_attention_backward: ", problem.batch,
                  " sequences of ", problem.max_k, " keys are too many for one launch");
  launch(flash_backward_keys_kernel<T, Tile>, dim3(static_cast<unsigned>(blocks)),
         dim3(Tile::kThreads), Tile::kSharedBytes, stream, call);
}

}  // namespace pumice::cuda
