// kernel: flash_backward_fp32
//
// The gradients of fp32 operands, by fp32 multiplications: the tensor cores would round to TF32.
//
// A block owns a tile of keys (for grad_key and grad_value) or of queries (for grad_query), and
// goes through the tiles of the other side that see, or are seen by, one of them. Of a pair of
// tiles a thread computes P and dS of up to 2 × 2 elements, which go to shared memory; then, of a
// few of the owned rows, every 32nd column of the gradients.
//
// Floor on an H200: 67 TFLOP/s of fp32, seven products; for D = 128, causal, 4k tokens, 16 heads
// (0.24 TFLOP) 3.6 ms. A thread reads 4 · 16 bytes of shared memory for 16 multiplications of
// scores, and 20 for 4 of gradients: expected 20 to 25 % of the floor's rate. This path is for
// exactness.
#include <cmath>

#include "cuda/attention/flash_backward.h"
#include "cuda/launch.h"

namespace pumice::cuda {
namespace {

template <int kTileRows, int kDimUpTo>
struct Fp32GradTile {
  static constexpr int kRows = kTileRows;  // of both sides
  static constexpr int kMaxDim = kDimUpTo;
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kElements = kRows / 16;          // of a thread, along each side
  static constexpr int kRowsOfWarp = kRows / kWarps;    // of the owned ones, whose gradients it has
  static constexpr int kColumns = kMaxDim / kWarpSize;  // of a lane

  // 4 words of padding: 16 bytes that neighbouring rows read at once lie in different banks.
  static constexpr int kStride = kMaxDim + 4;
  static constexpr int kTileFloats = kRows * kStride;
  static constexpr int kWeightStride = kRows + 4;
  static constexpr size_t kSharedBytes = (4 * kTileFloats + 2 * kRows * kWeightStride) * 4;
};

// 77 and 69 KB.
using Fp32GradTile128 = Fp32GradTile<32, 128>;
using Fp32GradTile256 = Fp32GradTile<16, 256>;

// The two tiles of one side: of query and grad_out, or of key and value.
struct Fp32Side {
  float *keyed, *valued;  // of D columns, and of D_v
};

template <class Tile, bool kOfKeys>
class Fp32Gradients {
 public:
  __device__ Fp32Gradients(const FlashBackward& call, const FlashSequence& sequence, int first)
      : call_(call), problem_(call.problem), sequence_(sequence), first_(first) {
    auto* shared = dynamic_shared_memory<float>();
    owned_ = {shared, shared + Tile::kTileFloats};
    other_ = {shared + 2 * Tile::kTileFloats, shared + 3 * Tile::kTileFloats};
    p_ = shared + 4 * Tile::kTileFloats;
    ds_ = p_ + Tile::kRows * Tile::kWeightStride;
  }

  // head: of the keys, or of the queries.
  __device__ void run(int head) {
    const auto group = static_cast<int>(problem_.group());
    if constexpr (kOfKeys) {
      load_keys(owned_, head, first_);
      for (int h = head * group; h < (head + 1) * group; ++h) add_head(h);
    } else {
      load_queries(owned_, head, first_);
      add_head(head);
    }
    store(head);
  }

 private:
  static __device__ int thread() { return static_cast<int>(threadIdx.x); }

  __device__ void load(float* tile, const TokenView& view, int64_t begin, int head, int first,
                       int length, int64_t dim) const {
    const int padded = (static_cast<int>(dim) + kWarpSize - 1) / kWarpSize * kWarpSize;
    for (int r = warp_index(); r < Tile::kRows; r += Tile::kWarps) {
      const float* from = static_cast<const float*>(view.data) +
                          token_offset(view, sequence_.batch, begin, first + r, head);
      for (int d = lane_index(); d < padded; d += kWarpSize) {
        tile[r * Tile::kStride + d] = first + r < length && d < dim ? from[d] : 0.0f;
      }
    }
  }
  __device__ void load_queries(const Fp32Side& to, int head, int first) const {
    load(to.keyed, problem_.query, sequence_.q_begin, head, first, sequence_.q_len,
         problem_.head_dim);
    load(to.valued, call_.grad_out, sequence_.q_begin, head, first, sequence_.q_len,
         problem_.value_dim);
  }
  __device__ void load_keys(const Fp32Side& to, int kv_head, int first) const {
    load(to.keyed, problem_.key, sequence_.k_begin, kv_head, first, sequence_.k_len,
         problem_.head_dim);
    load(to.valued, problem_.value, sequence_.k_begin, kv_head, first, sequence_.k_len,
         problem_.value_dim);
  }

  __device__ void add_head(int h) {
    const MaskView mask =
        mask_view(problem_.mask, sequence_.batch, h, sequence_.q_len, sequence_.k_len);
    const int last = min(first_ + Tile::kRows, kOfKeys ? mask.k_len : mask.q_len);
    BlockWalk walk;
    if constexpr (kOfKeys) {
      walk = mask.queries_of(first_, last, Tile::kRows);
    } else {
      walk = mask.keys_of(first_, last, Tile::kRows);
    }
    const auto next = [&](int n) {
      return kOfKeys ? mask.next_queries(walk, first_, last, n)
                     : mask.next_keys(walk, first_, last, n);
    };
    const int end = walk.block_end();
#pragma unroll 1
    for (int n = next(0); n < end; n = next(n + 1)) {
      __syncthreads();  // the tile before this is used up
      if constexpr (kOfKeys) {
        load_queries(other_, h, n * Tile::kRows);
      } else {
        load_keys(other_, h / static_cast<int>(problem_.group()), n * Tile::kRows);
      }
      __syncthreads();
      make_scores(mask, h, n * Tile::kRows);
      __syncthreads();
      if constexpr (kOfKeys) {
        add(values_, p_, other_.valued, problem_.value_dim);
      }
      add(keys_, ds_, other_.keyed, problem_.head_dim);
    }
  }

  // sums[a][b] = row 16a + thread mod 16 of the owned tile · row 16b + thread / 16 of the other.
  __device__ void multiply(float (&sums)[Tile::kElements][Tile::kElements], const float* owned,
                           const float* other, int64_t dim) const {
    const float* owned_row = owned + thread() % 16 * Tile::kStride;
    const float* other_row = other + thread() / 16 * Tile::kStride;
#pragma unroll 4
    for (int d = 0; d < dim; d += 4) {
      float4 x[Tile::kElements], y[Tile::kElements];
#pragma unroll
      for (int a = 0; a < Tile::kElements; ++a) {
        x[a] = *reinterpret_cast<const float4*>(owned_row + a * 16 * Tile::kStride + d);
        y[a] = *reinterpret_cast<const float4*>(other_row + a * 16 * Tile::kStride + d);
      }
#pragma unroll
      for (int a = 0; a < Tile::kElements; ++a) {
#pragma unroll
        for (int b = 0; b < Tile::kElements; ++b) {
          float sum = sums[a][b];
          sum = fmaf(x[a].x, y[b].x, sum);
          sum = fmaf(x[a].y, y[b].y, sum);
          sum = fmaf(x[a].z, y[b].z, sum);
          sums[a][b] = fmaf(x[a].w, y[b].w, sum);
        }
      }
    }
  }

  // P and dS of a pair of tiles, [other row][owned row].
  __device__ void make_scores(const MaskView& mask, int h, int other_first) const {
    float s[Tile::kElements][Tile::kElements] = {}, dp[Tile::kElements][Tile::kElements] = {};
    multiply(s, owned_.keyed, other_.keyed, problem_.head_dim);
    multiply(dp, owned_.valued, other_.valued, problem_.value_dim);
    const ScoreRule& rule = problem_.score;
    const float alibi = rule.alibi_slopes == nullptr
                            ? 0.0f
                            : rule.alibi_slopes[sequence_.batch * rule.alibi_batch_stride + h];
#pragma unroll
    for (int a = 0; a < Tile::kElements; ++a) {
#pragma unroll
      for (int b = 0; b < Tile::kElements; ++b) {
        const int owned_row = 16 * a + thread() % 16, other_row = 16 * b + thread() / 16;
        const int i = kOfKeys ? other_first + other_row : first_ + owned_row;
        const int j = kOfKeys ? first_ + owned_row : other_first + other_row;
        float p = 0.0f, ds = 0.0f;
        if (i < mask.q_len && j < mask.k_len && mask.visible(i, j)) {
          const int64_t row = lse_offset(problem_, sequence_, i, h);
          const float score = attention_score(s[a][b], rule.softmax_scale, rule.softcap);
          const float slope = attention_score_slope(score, rule.softmax_scale, rule.softcap);
          const float lse = call_.lse[row];
          p = lse == -INFINITY ? 0.0f : expf(score + alibi_bias(alibi, mask.position(i), j) - lse);
          ds = p * (dp[a][b] - call_.delta[row]) * slope;
        }
        p_[other_row * Tile::kWeightStride + owned_row] = p;
        ds_[other_row * Tile::kWeightStride + owned_row] = ds;
      }
    }
  }

  using Sums = float[Tile::kRowsOfWarp][Tile::kColumns];

  __device__ void add(Sums& sums, const float* weights, const float* tile, int64_t dim) const {
    const float* weight = weights + warp_index() * Tile::kRowsOfWarp;
#pragma unroll 4
    for (int r = 0; r < Tile::kRows; ++r) {
#pragma unroll
      for (int c = 0; c < Tile::kColumns; ++c) {
        if (c * kWarpSize >= dim) break;
        const float x = tile[r * Tile::kStride + c * kWarpSize + lane_index()];
#pragma unroll
        for (int o = 0; o < Tile::kRowsOfWarp; ++o) {
          sums[o][c] = fmaf(weight[r * Tile::kWeightStride + o], x, sums[o][c]);
        }
      }
    }
  }

  __device__ void store(int head) const {
    if constexpr (kOfKeys) {
      const int64_t token =
          problem_.packed() ? sequence_.k_begin : sequence_.batch * problem_.max_k;
      store(values_, call_.grad_value, token, problem_.kv_heads, head, problem_.value_dim,
            sequence_.k_len);
      store(keys_, call_.grad_key, token, problem_.kv_heads, head, problem_.head_dim,
            sequence_.k_len);
    } else {
      store(keys_, call_.grad_query, sequence_.q_token, problem_.heads, head, problem_.head_dim,
            sequence_.q_len);
    }
  }
  __device__ void store(const Sums& sums, void* gradient, int64_t token, int64_t heads, int head,
                        int64_t dim, int length) const {
#pragma unroll
    for (int o = 0; o < Tile::kRowsOfWarp; ++o) {
      const int row = first_ + warp_index() * Tile::kRowsOfWarp + o;
      if (row >= length) break;
      float* to = static_cast<float*>(gradient) + ((token + row) * heads + head) * dim;
#pragma unroll
      for (int c = 0; c < Tile::kColumns; ++c) {
        const int d = c * kWarpSize + lane_index();
        if (d < dim) to[d] = sums[o][c];
      }
    }
  }

  const FlashBackward& call_;
  const AttentionProblem& problem_;
  const FlashSequence sequence_;
  int first_;
  Fp32Side owned_, other_;
  float *p_, *ds_;
  Sums keys_ = {};  // of grad_key, or of grad_query
  Sums values_ = {};
};

template <class Tile, bool kOfKeys>
__global__ void __launch_bounds__(Tile::kThreads)
    flash_backward_fp32_kernel(const __grid_constant__ FlashBackward call) {
  const AttentionProblem& problem = call.problem;
  const int64_t length = kOfKeys ? problem.max_k : problem.max_q;
  const auto tiles = static_cast<int>((length + Tile::kRows - 1) / Tile::kRows);
  const auto heads = static_cast<int>(kOfKeys ? problem.kv_heads : problem.heads);
  const auto block = static_cast<int>(blockIdx.x);
  const FlashSequence sequence = flash_sequence(problem, block / tiles / heads);
  // The longest first under a causal mask: the first keys, the last queries.
  const int tile = kOfKeys ? block % tiles : tiles - 1 - block % tiles;
  const int first = tile * Tile::kRows;
  if (first >= (kOfKeys ? sequence.k_len : sequence.q_len)) return;
  Fp32Gradients<Tile, kOfKeys>(call, sequence, first).run(block / tiles % heads);
}

template <class Tile, bool kOfKeys>
void launch_fp32(const FlashBackward& call, cudaStream_t stream) {
  const AttentionProblem& problem = call.problem;
  const int64_t length = kOfKeys ? problem.max_k : problem.max_q;
  const int64_t blocks = (length + Tile::kRows - 1) / Tile::kRows *
                         (kOfKeys ? problem.kv_heads : problem.heads) * problem.batch;
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks <= INT32_MAX, "pumice::flash_attention_backward: ", problem.batch,
                  " sequences of ", length, " tokens are too large for one launch");
  launch(flash_backward_fp32_kernel<Tile, kOfKeys>, dim3(static_cast<unsigned>(blocks)),
         dim3(Tile::kThreads), Tile::kSharedBytes, stream, call);
}

template <class Tile>
void launch_fp32(const FlashBackward& call, cudaStream_t stream) {
  launch_fp32<Tile, true>(call, stream);
  launch_fp32<Tile, false>(call, stream);
}

}  // namespace

void flash_backward_fp32(const FlashBackward& call, cudaStream_t stream) {
  if (call.problem.head_dim <= 128 && call.problem.value_dim <= 128) {
    launch_fp32<Fp32GradTile128>(call, stream);
  } else {
    launch_fp32<Fp32GradTile256>(call, stream);
  }
}

}  // namespace pumice::cuda
