// kernel: attention_forward
//
// A task of flash attention: up to kTaskRows rows of scores, kBlockKeys keys at a time. See
// attention_softmax.h for what happens between the two products.
#include "cpu/attention_forward.h"

#include <algorithm>
#include <bit>

#include "cpu/attention_block.h"
#include "cpu/attention_softmax.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr int64_t kSumLength = 128;

// What a task keeps in cache. Rows are those of head 0, then head 1, …; `queries` of each.
struct Tile {
  float* query;       // [rows, D]
  float* key;         // [D, kBlockKeys]: transposed
  float* value;       // [kBlockKeys, D_v]
  float* scores;      // [rows, kBlockKeys]
  float* sums;        // [rows, D_v]
  float* weights;     // [rows, kLanes]: the sums of probabilities
  float* reference;   // [rows]
  float* transposed;  // [kBlockPad, D]
  uint64_t* visible;  // [queries]
  int64_t query_stride, value_stride;

  // With no memory, only the size in floats is of interest.
  static int64_t lay_out(const AttentionProblem& problem, float* memory, Tile& tile) {
    tile.query_stride = padded_columns(problem.head_dim);
    tile.value_stride = padded_columns(problem.value_dim);
    int64_t size = 0;
    const auto piece = [&](int64_t count) {
      float* at = memory == nullptr ? nullptr : memory + size;
      size += padded_columns(count);
      return at;
    };
    tile.query = piece(kTaskRows * tile.query_stride);
    tile.key = piece(problem.head_dim * kBlockKeys);
    tile.value = piece(kBlockKeys * tile.value_stride);
    tile.scores = piece(kTaskRows * kBlockKeys);
    tile.sums = piece(kTaskRows * tile.value_stride);
    tile.weights = piece(kTaskRows * kLanes);
    tile.reference = piece(kTaskRows);
    tile.transposed = piece(kBlockPad * tile.query_stride);
    tile.visible = reinterpret_cast<uint64_t*>(piece(2 * kTaskRows));
    return size;
  }
};

int64_t scratch_size(const AttentionProblem& problem) {
  Tile tile;
  return Tile::lay_out(problem, nullptr, tile);
}

class Forward {
 public:
  Forward(const AttentionProblem& problem, const AttentionTask& task, float* scratch)
      : problem_(problem),
        task_(task),
        mask_(mask_view(problem.mask, task.batch, task.head, task.q_len, task.k_len)),
        queries_(task.m1 - task.m0),
        rows_(queries_ * task.heads) {
    Tile::lay_out(problem, scratch, tile_);
  }

  void run() {
    begin();
    const BlockWalk walk = mask_.keys_of(task_.m0, task_.m1, kBlockKeys);
    int32_t n = task_.n0 / kBlockKeys;
    const int32_t end = std::min(walk.block_end(), (task_.n1 + kBlockKeys - 1) / kBlockKeys);
    while ((n = mask_.next_keys(walk, task_.m0, task_.m1, n)) < end) {
      block(n * kBlockKeys);
      ++n;
    }
    finish();
  }

 private:
  void begin() {
    for (int32_t h = 0; h < task_.heads; ++h) {
      const int64_t at = task_.query + task_.m0 * problem_.query.token_stride +
                         (task_.head + h) * problem_.query.head_stride;
      load_block(problem_.query.data, problem_.dtype, at, problem_.query.token_stride, queries_,
                 problem_.head_dim,
                 {tile_.query + h * queries_ * tile_.query_stride, tile_.query_stride});
    }
    std::fill_n(tile_.sums, rows_ * tile_.value_stride, 0.0f);
    std::fill_n(tile_.weights, rows_ * kLanes, 0.0f);
    std::fill_n(tile_.reference, rows_, -kInfinity);
  }

  // Keys [n0, n0 + kBlockKeys), or as many as there are.
  void block(int32_t n0) {
    const int64_t kv_head = task_.head / problem_.group();
    const int32_t count = std::min(kBlockKeys, task_.k_len - n0);
    load_transposed(problem_.key.data, problem_.dtype,
                    task_.key + n0 * problem_.key.token_stride + kv_head * problem_.key.head_stride,
                    problem_.key.token_stride, count, problem_.head_dim, tile_.transposed,
                    {tile_.key, kBlockKeys});
    load_block(
        problem_.value.data, problem_.dtype,
        task_.value + n0 * problem_.value.token_stride + kv_head * problem_.value.head_stride,
        problem_.value.token_stride, count, problem_.value_dim, {tile_.value, tile_.value_stride});
    if (count == kBlockKeys && mask_.sees_all(task_.m0, task_.m1, n0, n0 + kBlockKeys)) {
      whole_block(n0);
      return;
    }
    for (int32_t i = 0; i < queries_; ++i) {
      tile_.visible[i] = visible_keys(mask_, task_.m0 + i, n0);
    }
    const bool finite = all_finite(count);
    for (int32_t row = 0; row < rows_; row += kTileRows) {
      partial_strip(n0, row, std::min(kTileRows, rows_ - row), finite);
    }
  }

  void whole_block(int32_t n0) {
    multiply_keys(0, rows_, 0, kBlockKeys);
    for (int32_t row = 0; row < rows_; ++row) softmax<false>(row, n0, 0, kBlockKeys, 0);
    multiply_block<true>({tile_.scores, kBlockKeys}, {tile_.value, tile_.value_stride},
                         {tile_.sums, tile_.value_stride}, rows_, tile_.value_stride, kBlockKeys);
  }

  // The products q·k, in pieces along D: a sum of many terms one after another would round worse
  // than the pairwise or blocked ones of other libraries.
  void multiply_keys(int32_t row, int32_t rows, int left, int right) {
    for (int64_t d = 0; d < problem_.head_dim; d += kSumLength) {
      const LeftOperand q{query(row) + d, tile_.query_stride};
      const BlockRows<const float> k{tile_.key + d * kBlockKeys + left, kBlockKeys};
      const BlockRows<float> products{scores(row) + left, kBlockKeys};
      const int64_t length = std::min(kSumLength, problem_.head_dim - d);
      if (d == 0) {
        multiply_block<false>(q, k, products, rows, right - left, length);
      } else {
        multiply_block<true>(q, k, products, rows, right - left, length);
      }
    }
  }

  // Rows of a block that some of them see only in part: all that is done is done for the columns
  // from the first to the last one visible.
  void partial_strip(int32_t n0, int32_t row, int32_t rows, bool finite) {
    uint64_t any = 0;
    for (int32_t r = row; r < row + rows; ++r) any |= tile_.visible[r % queries_];
    if (any == 0) return;
    const int first = std::countr_zero(any), last = 64 - std::countl_zero(any);
    const int left = static_cast<int>(first / kBlockPad * kBlockPad);
    const int right = static_cast<int>(padded_columns(last));
    multiply_keys(row, rows, left, right);
    for (int32_t r = row; r < row + rows; ++r) {
      softmax<true>(r, n0, left, right, tile_.visible[r % queries_]);
    }
    if (finite) {
      multiply_block<true>({scores(row) + first, kBlockKeys},
                           {tile_.value + first * tile_.value_stride, tile_.value_stride},
                           {sums(row), tile_.value_stride}, rows, tile_.value_stride, last - first);
      return;
    }
    // 0 · NaN is NaN: hidden values must not even be multiplied.
    for (int32_t r = row; r < row + rows; ++r) {
      for (uint64_t bits = tile_.visible[r % queries_]; bits != 0; bits &= bits - 1) {
        const int j = std::countr_zero(bits);
        multiply_block<true>({scores(r) + j, kBlockKeys},
                             {tile_.value + j * tile_.value_stride, tile_.value_stride},
                             {sums(r), tile_.value_stride}, 1, tile_.value_stride, 1);
      }
    }
  }

  template <bool kPartial>
  void softmax(int32_t row, int32_t n0, int left, int right, uint64_t visible) {
    const int32_t h = row / queries_, i = task_.m0 + row % queries_;
    const ScoreRule& score = problem_.score;
    RowScore rule{score.softmax_scale, score.softcap, 0.0f, score.alibi_slopes != nullptr,
                  mask_.position(i) - n0};
    if (!(score.softcap > 0.0f)) rule.scale *= kLog2E;
    if (rule.alibi) {
      rule.slope =
          kLog2E * score.alibi_slopes[task_.batch * score.alibi_batch_stride + task_.head + h];
    }
    const float factor = softmax_row<kPartial>(scores(row), left, right, visible, rule, state(row));
    if (factor == 1.0f) return;
    float* row_sums = sums(row);
    for (int64_t d = 0; d < tile_.value_stride; d += kLanes) {
      store(row_sums + d, multiply(load(row_sums + d), broadcast(factor)));
    }
  }

  bool all_finite(int32_t count) const {
    Vec nothing = zero();  // x·0 is 0 of every finite x, NaN of the others
    for (int64_t i = 0; i < count * tile_.value_stride; i += kLanes) {
      nothing = fma(load(tile_.value + i), zero(), nothing);
    }
    return sum(nothing) == 0.0f;
  }

  void finish() {
    for (int32_t row = 0; row < rows_; ++row) {
      const int64_t head = task_.head + row / queries_, i = task_.m0 + row % queries_;
      const float sink = task_.sinks != nullptr ? task_.sinks[head] : -kInfinity;
      const RowEnd end = finish_row(state(row), sink);
      task_.lse[head * task_.lse_head_stride + i] = end.lse;
      float* row_sums = sums(row);
      for (int64_t d = 0; d < tile_.value_stride; d += kLanes) {
        store(row_sums + d, multiply(load(row_sums + d), broadcast(end.factor)));
      }
      store_row(row_sums, (i * problem_.heads + head) * problem_.value_dim);
    }
  }

  void store_row(const float* row, int64_t at) {
    const int64_t count = problem_.value_dim;
    for (int64_t d = 0; d < count; d += 4) {
      Float4 four;
      std::memcpy(&four, row + d, sizeof(four));
      store_four(task_.out, task_.out_dtype, at + d,
                 static_cast<int>(std::min<int64_t>(4, count - d)), four);
    }
  }

  float* query(int32_t row) const { return tile_.query + row * tile_.query_stride; }
  float* scores(int32_t row) const { return tile_.scores + row * kBlockKeys; }
  float* sums(int32_t row) const { return tile_.sums + row * tile_.value_stride; }
  RowState state(int32_t row) const {
    return {tile_.reference + row, tile_.weights + row * kLanes};
  }

  const AttentionProblem& problem_;
  const AttentionTask& task_;
  const MaskView mask_;
  const int32_t queries_, rows_;
  Tile tile_;
};

void run(const AttentionProblem& problem, const AttentionTask& task, float* scratch) {
  Forward(problem, task, scratch).run();
}

}  // namespace

const AttentionForwardKernels attention_forward_kernels = {scratch_size, run};

}  // namespace pumice::cpu::PUMICE_ISA
