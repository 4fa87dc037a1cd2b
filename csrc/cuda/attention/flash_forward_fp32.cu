// kernel: flash_forward_fp32
//
// Attention of fp32 operands, by fp32 multiplications: the tensor cores would round to TF32.
//
// A block has 32 rows at 32 keys a step. A thread has the scores of 4 rows and 2 keys, and the sums
// of the same 4 rows and every 16th column of the values. Queries, and keys or values in turn, lie
// in shared memory; rows of any address are read element by element, neighbours by neighbouring
// lanes.
//
// Floor on an H200: 67 TFLOP/s of fp32, for D = 128, causal, 4k tokens, 16 heads (69 GFLOP) 1.0 ms.
// A thread reads 6 · 16 bytes of shared memory for 32 multiplications of scores, and 4 bytes
// for 2.7 of values: that is the limit, at some 30 % of the floor's rate. This path is for
// exactness.
#include "cuda/attention/flash_forward.h"
#include "cuda/attention/flash_mainloop.h"
#include "cuda/attention/flash_outside.h"
#include "cuda/attention/paged_source.h"
#include "cuda/element.h"
#include "cuda/launch.h"

namespace pumice::cuda {
namespace {

template <int kColumnsOfThread>
struct Fp32Tile {
  static constexpr int kRows = kFlashRowsFp32;
  static constexpr int kKeys = 32;
  static constexpr int kThreads = 128;
  static constexpr int kLanesOfRow = 16;
  static constexpr int kRowsOfThread = kRows * kLanesOfRow / kThreads;
  static constexpr int kKeysOfThread = kKeys / kLanesOfRow;
  static constexpr int kColumns = kColumnsOfThread;
  static constexpr int kMaxDim = kColumns * kLanesOfRow;

  // 4 words of padding: 16 bytes that neighbouring rows read at once lie in different banks.
  static constexpr int kStride = kMaxDim + 4;
  static constexpr int kWeightStride = kKeys + 1;
  static constexpr int kTileOffset = kRows * kStride;  // in floats
  static constexpr int kWeightOffset = kTileOffset + kKeys * kStride;
  static constexpr int kBlockOffset = (kWeightOffset + kRows * kWeightStride + 1) / 2 * 2;
  static constexpr size_t kSharedBytes = kBlockOffset * 4 + FlashShort64::kBlockBytes;
};

// p of a key that the row does not see; others are not negative, or NaN.
constexpr float kHidden = -1.0f;

template <class Tile, class Source>
class Fp32Rows {
 public:
  __device__ Fp32Rows(const FlashForward& call, const FlashBlock<Source>& block, float* shared)
      : call_(call),
        block_(block),
        work_(block.work),
        query_(shared),
        tile_(shared + Tile::kTileOffset),
        weights_(shared + Tile::kWeightOffset) {
    const auto thread = static_cast<int>(threadIdx.x);
    row0_ = thread / Tile::kLanesOfRow * Tile::kRowsOfThread;
    lane_ = thread % Tile::kLanesOfRow;
    for (int r = 0; r < Tile::kRowsOfThread; ++r) largest_[r] = -INFINITY;
  }

  __device__ void run() {
    const auto head_dim = static_cast<int>(call_.problem.head_dim);
    const auto value_dim = static_cast<int>(call_.problem.value_dim);
    const TokenView& view = call_.problem.query;
    const int pack = call_.plan.pack;
    const auto as_it_is = [](const float* row, int column) { return row[column]; };
    load(query_, work_.rows, head_dim, as_it_is, [&](int r) {
      return static_cast<const float*>(view.data) +
             token_offset(view, work_.sequence.batch, work_.sequence.q_begin, work_.query(r, pack),
                          work_.head(r, pack));
    });
    const Source& source = block_.source;
    const MaskView& mask = block_.mask;
    int n = mask.next_keys(block_.walk, block_.m0, block_.m1, block_.first);
#pragma unroll 1
    while (n < block_.end) {
      const int j0 = n * Tile::kKeys, keys = mask.k_len - j0;
      const bool partial = !block_.sees_all(n, Tile::kKeys);
      load(
          tile_, keys, head_dim,
          [&](const unsigned char* row, int column) { return source.key_element(row, column); },
          [&](int r) { return source.key(j0 + r); });
      __syncthreads();
      weigh(j0, head_dim, partial);
      __syncthreads();
      load(
          tile_, keys, value_dim,
          [&](const unsigned char* row, int column) { return source.value_element(row, column); },
          [&](int r) { return source.value(j0 + r); });
      __syncthreads();
      add(value_dim, partial);
      __syncthreads();
      n = block_.after(n);
    }
  }

  __device__ void store() const {
    const int pack = call_.plan.pack;
    const auto value_dim = static_cast<int>(call_.problem.value_dim);
    const bool whole = work_.parts == 1;
#pragma unroll
    for (int r = 0; r < Tile::kRowsOfThread; ++r) {
      const int row = row0_ + r;
      if (row >= work_.rows) continue;
      const int head = work_.head(row, pack), i = work_.query(row, pack);
      float largest = largest_[r], sum = sum_[r], rescale = 1.0f;
      if (whole && call_.problem.score.sinks != nullptr) {
        const float sink = call_.problem.score.sinks[head];
        const float with_sink = fmaxf(largest, sink);
        rescale = with_sink == -INFINITY ? 1.0f : expf(largest - with_sink);
        sum = sum * rescale + (sink == -INFINITY ? 0.0f : expf(sink - with_sink));
        largest = with_sink;
      }
      const float factor = sum == 0.0f ? 0.0f : rescale / sum;
      float* out;
      if (whole) {
        out = static_cast<float*>(call_.out) +
              result_offset(call_.problem, work_.sequence, i, head, value_dim);
      } else {
        out = call_.partial_out +
              work_.partial_row(call_.plan, row) * flash_partial_columns(value_dim);
      }
#pragma unroll
      for (int c = 0; c < Tile::kColumns; ++c) {
        const int column = lane_ + c * Tile::kLanesOfRow;
        if (column < value_dim) out[column] = sums_[r][c] * factor;
      }
      if (lane_ != 0) continue;
      const float lse = sum == 0.0f ? -INFINITY : largest + logf(sum);
      if (whole) {
        call_.lse[lse_offset(call_.problem, work_.sequence, i, head)] = lse;
      } else {
        call_.partial_lse[work_.partial_row(call_.plan, row)] = lse;
      }
    }
  }

 private:
  // Rows that exist (the source of one that does not may be null, too) to shared memory, a warp for
  // each; the others, and columns up to a multiple of 4, become zero.
  template <class Element, class RowSource>
  __device__ static void load(float* tile, int rows, int columns, Element&& element,
                              RowSource&& row_source) {
    const int padded = (columns + Tile::kLanesOfRow - 1) / Tile::kLanesOfRow * Tile::kLanesOfRow;
    for (int r = warp_index(); r < 32; r += Tile::kThreads / kWarpSize) {
      const auto* row = r < rows ? row_source(r) : nullptr;
      for (int c = lane_index(); c < padded; c += kWarpSize) {
        tile[r * Tile::kStride + c] = row != nullptr && c < columns ? element(row, c) : 0.0f;
      }
    }
  }

  // Scores, the softmax's new reference, and p to shared memory.
  __device__ void weigh(int j0, int head_dim, bool partial) {
    float s[Tile::kRowsOfThread][Tile::kKeysOfThread] = {};
    for (int d = 0; d < head_dim; d += 4) {
      float4 k[Tile::kKeysOfThread];
#pragma unroll
      for (int e = 0; e < Tile::kKeysOfThread; ++e) {
        k[e] = *reinterpret_cast<const float4*>(
            tile_ + (lane_ + e * Tile::kLanesOfRow) * Tile::kStride + d);
      }
#pragma unroll
      for (int r = 0; r < Tile::kRowsOfThread; ++r) {
        const float4 q = *reinterpret_cast<const float4*>(query_ + (row0_ + r) * Tile::kStride + d);
#pragma unroll
        for (int e = 0; e < Tile::kKeysOfThread; ++e) {
          s[r][e] += q.x * k[e].x + q.y * k[e].y + q.z * k[e].z + q.w * k[e].w;
        }
      }
    }
    const MaskView& mask = block_.mask;
    const ScoreRule& rule = call_.problem.score;
#pragma unroll
    for (int r = 0; r < Tile::kRowsOfThread; ++r) {
      const int row = min(row0_ + r, work_.rows - 1), pack = call_.plan.pack;
      const int i = work_.query(row, pack);
      float slope = 0.0f;
      if (rule.alibi_slopes != nullptr) {
        slope = rule.alibi_slopes[work_.sequence.batch * rule.alibi_batch_stride +
                                  work_.head(row, pack)];
      }
      bool visible[Tile::kKeysOfThread];
      float largest = -INFINITY;
#pragma unroll
      for (int e = 0; e < Tile::kKeysOfThread; ++e) {
        const int j = j0 + lane_ + e * Tile::kLanesOfRow;
        visible[e] = !partial || (j < mask.k_len && mask.visible(i, j));
        s[r][e] = attention_score(s[r][e], rule.softmax_scale, rule.softcap) +
                  alibi_bias(slope, mask.position(i), j);
        if (visible[e]) largest = fmaxf(largest, s[r][e]);
      }
#pragma unroll
      for (int step = 1; step < Tile::kLanesOfRow; step *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, step));
      }
      largest = fmaxf(largest, largest_[r]);
      const float factor = largest_[r] == -INFINITY ? 0.0f : expf(largest_[r] - largest);
      largest_[r] = largest;
      float sum = 0.0f;
#pragma unroll
      for (int e = 0; e < Tile::kKeysOfThread; ++e) {
        // A row whose visible scores are all -∞ has p = 0, not e^(-∞ + ∞).
        const float p = s[r][e] == -INFINITY ? 0.0f : expf(s[r][e] - largest);
        if (visible[e]) sum += p;
        weights_[(row0_ + r) * Tile::kWeightStride + lane_ + e * Tile::kLanesOfRow] =
            visible[e] ? p : kHidden;
      }
#pragma unroll
      for (int step = 1; step < Tile::kLanesOfRow; step *= 2) {
        sum += __shfl_xor_sync(kFullWarp, sum, step);
      }
      sum_[r] = sum_[r] * factor + sum;
#pragma unroll
      for (int c = 0; c < Tile::kColumns; ++c) sums_[r][c] *= factor;
    }
  }

  // sums += p · values; 0 · NaN of a hidden key does not count.
  __device__ void add(int value_dim, bool partial) {
#pragma unroll 2
    for (int j = 0; j < Tile::kKeys; ++j) {
      float p[Tile::kRowsOfThread];
#pragma unroll
      for (int r = 0; r < Tile::kRowsOfThread; ++r) {
        p[r] = weights_[(row0_ + r) * Tile::kWeightStride + j];
      }
#pragma unroll
      for (int c = 0; c < Tile::kColumns; ++c) {
        if (c * Tile::kLanesOfRow >= value_dim) break;
        const float value = tile_[j * Tile::kStride + lane_ + c * Tile::kLanesOfRow];
#pragma unroll
        for (int r = 0; r < Tile::kRowsOfThread; ++r) {
          const float term = p[r] * value;
          if (!partial || p[r] != kHidden) sums_[r][c] += term;
        }
      }
    }
  }

  const FlashForward& call_;
  const FlashBlock<Source>& block_;
  const FlashWork& work_;
  float *query_, *tile_, *weights_;
  int row0_, lane_;
  float largest_[Tile::kRowsOfThread];
  float sum_[Tile::kRowsOfThread] = {};
  float sums_[Tile::kRowsOfThread][Tile::kColumns] = {};
};

template <class Tile, class Source>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    flash_forward_fp32_kernel(const __grid_constant__ typename Source::Call call) {
  store_outside<float>(call);
  auto* shared = dynamic_shared_memory<float>();
  using Block = FlashBlock<Source>;
  static_assert(sizeof(Block) <= FlashShort64::kBlockBytes);
  auto* block = reinterpret_cast<Block*>(shared + Tile::kBlockOffset);
  if (threadIdx.x == 0) {
    const FlashWork work(call);
    block->work.exists = work.exists;
    if (work.exists) {
      const int kv_head = work.head0 / static_cast<int>(call.problem.group());
      *block = Block(call, work, Source::of(call, work.sequence, kv_head), Tile::kKeys);
    }
  }
  __syncthreads();
  if (!block->work.exists) return;
  Fp32Rows<Tile, Source> rows(call, *block, shared);
  rows.run();
  rows.store();
}

template <class Tile, class Source>
void launch_fp32(const typename Source::Call& call, int64_t blocks, cudaStream_t stream) {
  launch(flash_forward_fp32_kernel<Tile, Source>, dim3(static_cast<unsigned>(blocks)),
         dim3(Tile::kThreads), Tile::kSharedBytes, stream, call);
}

template <class Source>
void launch_fp32_of_dims(const typename Source::Call& call, int64_t blocks, cudaStream_t stream) {
  const int64_t dim = std::max(call.problem.head_dim, call.problem.value_dim);
  if (dim <= 64) return launch_fp32<Fp32Tile<4>, Source>(call, blocks, stream);
  if (dim <= 128) return launch_fp32<Fp32Tile<8>, Source>(call, blocks, stream);
  return launch_fp32<Fp32Tile<16>, Source>(call, blocks, stream);
}

}  // namespace

void flash_forward_fp32(const FlashForward& call, int64_t blocks, cudaStream_t stream) {
  launch_fp32_of_dims<ContiguousKeys>(call, blocks, stream);
}

void paged_forward_fp32(const PagedForward& call, int64_t blocks, cudaStream_t stream) {
  switch (call.cache.type) {
    case CacheType::kFloat8E4M3:
      return launch_fp32_of_dims<PagedBytes<CacheType::kFloat8E4M3>>(call, blocks, stream);
    case CacheType::kInt8:
      return launch_fp32_of_dims<PagedBytes<CacheType::kInt8>>(call, blocks, stream);
    default:
      return launch_fp32_of_dims<PagedKeys>(call, blocks, stream);
  }
}

}  // namespace pumice::cuda
