// kernel: attention_forward
//
// A task of flash attention: up to kTaskRows rows of scores, kBlockKeys keys at a time. See
// attention_tile.h for the two products and attention_softmax.h for what happens between them.
#include "cpu/attention_forward.h"

#include <algorithm>
#include <bit>

#include "cpu/attention_softmax.h"
#include "cpu/attention_tile.h"
#include "cpu/paged_block.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

int64_t scratch_size(const AttentionProblem& problem) {
  Tile tile;
  return Tile::lay_out(problem, nullptr, tile);
}

// Of tasks of more than a few rows; of those, the products q·k if whole registers hold them.
constexpr Kind kPairsIfAny = kHasPairs ? Kind::kPairs : Kind::kFloats;
bool takes_pairs(const AttentionProblem& problem) {
  return kHasPairs && problem.dtype == DType::kBFloat16;
}

// Rows of a task that share keys.
int32_t rows_of_kv_head(const AttentionProblem& problem, const AttentionTask& task) {
  return (task.m1 - task.m0) * static_cast<int32_t>(std::min<int64_t>(task.heads, problem.group()));
}

template <Kind kKind>
class Forward {
 public:
  Forward(const AttentionProblem& problem, const AttentionTask& task, float* scratch)
      : problem_(problem),
        task_(task),
        mask_(
            mask_view(problem.mask, task.batch, task.head, task.q_len, task.k_len, task.query_row)),
        keys_(problem, task, false),
        values_(problem, task, true),
        queries_(task.m1 - task.m0),
        rows_(queries_ * task.heads),
        kv_rows_(rows_of_kv_head(problem, task)),
        kv_head_(task.head / problem.group()),
        packed_size_(Tile::packed_size<kKind>(problem)) {
    Tile::lay_out(problem, scratch, tile_);
    tile_.length = length_of<kKind>(problem);
    in_place_ = problem.head_dim % kBlockPad == 0 && problem.value_dim % kBlockPad == 0;
    if (kKind == Kind::kRows && in_place_) {
      if (task.cache != nullptr) tile_.stored = task.cache->type;
      tile_.stored_dtype = problem.dtype;
      with_stored(tile_.stored, problem.dtype, [&](auto type) { stored_scale_ = type.kScale; });
      tile_.key_pairs = takes_pairs(problem) && tile_.stored == CacheType::kQuery &&
                        problem.head_dim % (2 * kBlockPad) == 0;
    }
  }

  void run() {
    begin();
    const BlockWalk walk = mask_.keys_of(task_.m0, task_.m1, kBlockKeys);
    const int32_t end = std::min(walk.block_end(), (task_.n1 + kBlockKeys - 1) / kBlockKeys);
    int32_t n = mask_.next_keys(walk, task_.m0, task_.m1, task_.n0 / kBlockKeys);
    while (n < end) {
      const int32_t next = mask_.next_keys(walk, task_.m0, task_.m1, n + 1);
      block(n * kBlockKeys, next < end ? next * kBlockKeys : task_.k_len);
      n = next;
    }
    finish();
  }

 private:
  void begin() {
    for (int32_t h = 0; h < task_.heads; ++h) {
      const HeadRows queries(problem_.query, problem_.dtype, task_.query, task_.head + h,
                             problem_.head_dim);
      tile_.load_queries<kKind>(queries, task_.m0, queries_, h * queries_);
    }
    std::fill_n(tile_.sums.data, rows_ * tile_.sums.stride, 0.0f);
    std::fill_n(tile_.weights, rows_ * kLanes, 0.0f);
    std::fill_n(tile_.reference, rows_, -kInfinity);
    std::fill_n(tile_.nothing, std::max(tile_.query.stride, tile_.sums.stride), 0.0f);
  }

  // Keys [n0, n0 + kBlockKeys), or as many as there are; next is where the block after begins.
  void block(int32_t n0, int32_t next) {
    const int32_t count = std::min(kBlockKeys, task_.k_len - n0);
    const bool whole =
        count == kBlockKeys && mask_.sees_all(task_.m0, task_.m1, n0, n0 + kBlockKeys);
    uint64_t seen = whole ? ~uint64_t{0} : 0;
    for (int32_t i = 0; !whole && i < queries_; ++i) {
      seen |= tile_.visible[i] = visible_keys(mask_, task_.m0 + i, n0);
    }
    if (seen == 0) return;
    // Head by head of what lies side by side, token by token: the block is in cache by then.
    for (int32_t row = 0; row < rows_; row += kv_rows_) kv_block(n0, next, row, whole, seen);
  }

  // The same for the rows of one KV head, from `begin` on.
  void kv_block(int32_t n0, int32_t next, int32_t begin, bool whole, uint64_t seen) {
    const int32_t count = std::min(kBlockKeys, task_.k_len - n0), end = begin + kv_rows_;
    const int64_t kv_head = kv_head_ + begin / kv_rows_;
    std::optional<HeadRows> values;
    if (kKind == Kind::kRows && in_place_) {
      keys_.locate(kv_head, n0, count, seen, tile_.nothing, tile_.key_rows);
      values_.locate(kv_head, n0, count, seen, tile_.nothing, tile_.value_rows);
    } else if (packed()) {
      values = values_.block(kv_head, n0, count, seen, tile_.value_pages);
      tile_.use_packed(packed_block(n0));
    } else {
      values = values_.block(kv_head, n0, count, seen, tile_.value_pages);
      tile_.load_keys<kKind>(keys_.block(kv_head, n0, count, seen, tile_.key_pages), n0, count);
      tile_.load_values<kKind>(*values, n0, count);
    }
    const bool finite = whole || tile_.values_are_finite<kKind>(count);
    constexpr int32_t kStrip = kKind == Kind::kRows ? kDotRows : kTileRows;
    for (int32_t row = begin; row < end; row += kStrip) {
      const int32_t rows = std::min(kStrip, end - row);
      fetch(next, row, rows);
      if (whole) {
        tile_.multiply_keys<kKind>(row, rows, 0, kBlockKeys, count);
        for (int32_t r = row; r < row + rows; ++r) softmax<false>(r, n0, 0, kBlockKeys, 0);
        tile_.multiply_values<kKind>(row, rows, 0, kBlockKeys);
      } else {
        partial_strip(n0, count, row, rows, finite, values ? &*values : nullptr);
      }
    }
  }

  // The block that begins at n0, into the second level of cache: the processor does not foresee
  // it, least of all tokens far apart. Every strip of rows fetches its share.
  void fetch(int32_t n0, int32_t row, int32_t rows) const {
    const int32_t count = std::min(kBlockKeys, task_.k_len - n0);
    if (packed()) {
      if (count <= 0) return;
      const float* next = packed_block(n0);
      const int64_t end = packed_size_ * (row + rows) / rows_;
      for (int64_t at = packed_size_ * row / rows_; at < end; at += kBlockPad) {
        __builtin_prefetch(next + at, 0, 2);
      }
      return;
    }
    const int32_t begin = n0 + count * row / rows_, end = n0 + count * (row + rows) / rows_;
    const int64_t heads = rows_ / kv_rows_;
    if constexpr (kKind == Kind::kRows) {  // a vector for each that is multiplied
      keys_.list(kv_head_, heads, begin, end, tile_.nothing, tile_.next_keys);
      values_.list(kv_head_, heads, begin, end, tile_.nothing, tile_.next_values);
    } else {
      keys_.fetch(kv_head_, heads, begin, end);
      values_.fetch(kv_head_, heads, begin, end);
    }
  }

  // A strip of a block that its rows see only in part: what is done is done for the columns from
  // the first to the last one visible.
  void partial_strip(int32_t n0, int32_t count, int32_t row, int32_t rows, bool finite,
                     const HeadRows* values) {
    uint64_t any = 0;
    for (int32_t r = row; r < row + rows; ++r) any |= tile_.visible[r % queries_];
    if (any == 0) return;
    const int first = std::countr_zero(any), last = kBlockKeys - std::countl_zero(any);
    // Registers of pairs hold two of floats.
    constexpr int kPad = kKind == Kind::kPairs ? 2 * kBlockPad : kBlockPad;
    const int left = first / kPad * kPad, right = (last + kPad - 1) / kPad * kPad;
    tile_.multiply_keys<kKind>(row, rows, left, right, count);
    for (int32_t r = row; r < row + rows; ++r) {
      softmax<true>(r, n0, left, right, tile_.visible[r % queries_]);
    }
    if (finite) {
      tile_.multiply_values<kKind>(row, rows, first, last);
      return;
    }
    for (int32_t r = row; r < row + rows; ++r) {
      for (uint64_t bits = tile_.visible[r % queries_]; bits != 0; bits &= bits - 1) {
        tile_.multiply_value<kKind>(r, std::countr_zero(bits), values, n0);
      }
    }
  }

  template <bool kPartial>
  void softmax(int32_t row, int32_t n0, int left, int right, uint64_t visible) {
    const ScoreRule& score = problem_.score;
    const bool alibi = score.alibi_slopes != nullptr;
    float factor;
    if (score.softcap > 0.0f) {
      factor = alibi ? softmax_by<kPartial, true, true>(row, n0, left, right, visible)
                     : softmax_by<kPartial, true, false>(row, n0, left, right, visible);
    } else {
      factor = alibi ? softmax_by<kPartial, false, true>(row, n0, left, right, visible)
                     : softmax_by<kPartial, false, false>(row, n0, left, right, visible);
    }
    if (factor == 1.0f) return;
    float* row_sums = tile_.sums.row(row);
    for (int64_t d = 0; d < tile_.sums.stride; d += kLanes) {
      store(row_sums + d, multiply(load(row_sums + d), broadcast(factor)));
    }
  }

  template <bool kPartial, bool kSoftcap, bool kAlibi>
  float softmax_by(int32_t row, int32_t n0, int left, int right, uint64_t visible) {
    const ScoreRule& score = problem_.score;
    const int32_t i = task_.m0 + row % queries_;
    RowScore<kSoftcap, kAlibi> rule{score.softmax_scale * key_scale(row), score.softcap, 0.0f,
                                    mask_.position(i) - n0};
    if constexpr (!kSoftcap) rule.scale *= kLog2E;
    if constexpr (kAlibi) {
      const int64_t head = task_.head + row / queries_;
      rule.slope = kLog2E * score.alibi_slopes[task_.batch * score.alibi_batch_stride + head];
    }
    return softmax_row<kPartial>(tile_.scores.row(row), left, right, visible, rule, state(row));
  }

  void finish() {
    for (int32_t row = 0; row < rows_; ++row) {
      const int64_t head = task_.head + row / queries_, i = task_.m0 + row % queries_;
      const float sink = task_.sinks != nullptr ? task_.sinks[head] : -kInfinity;
      const RowEnd end = finish_row(state(row), sink);
      task_.lse[head * task_.lse_head_stride + i] = end.lse;
      const Vec factor = broadcast(end.factor * value_scale(row));
      float* row_sums = tile_.sums.row(row);
      for (int64_t d = 0; d < tile_.sums.stride; d += kLanes) {
        store(row_sums + d, multiply(load(row_sums + d), factor));
      }
      store_elements(task_.out, task_.out_dtype, (i * problem_.heads + head) * problem_.value_dim,
                     problem_.value_dim, row_sums);
    }
  }

  // Of a quantized cache, and of what load() leaves out.
  float key_scale(int32_t row) const {
    return task_.cache == nullptr ? 1.0f
                                  : stored_scale_ * task_.cache->key_scale_of(kv_head_of(row));
  }
  float value_scale(int32_t row) const {
    return task_.cache == nullptr ? 1.0f
                                  : stored_scale_ * task_.cache->value_scale_of(kv_head_of(row));
  }
  int64_t kv_head_of(int32_t row) const { return kv_head_ + row / kv_rows_; }

  bool packed() const { return kKind != Kind::kRows && task_.packed != nullptr; }
  const float* packed_block(int32_t n0) const {
    return task_.packed + n0 / kBlockKeys * packed_size_;
  }

  RowState state(int32_t row) const {
    return {tile_.reference + row, tile_.weights + row * kLanes};
  }

  const AttentionProblem& problem_;
  const AttentionTask& task_;
  const MaskView mask_;
  const TokenSource keys_, values_;
  const int32_t queries_, rows_, kv_rows_;  // kv_rows_: of each KV head
  const int64_t kv_head_;                   // the first
  const int64_t packed_size_;
  bool in_place_;  // whether a few rows read keys and values so: they fill whole registers
  float stored_scale_ = 1.0f;
  Tile tile_;
};

int64_t packed_size(const AttentionProblem& problem) {
  return takes_pairs(problem) ? Tile::packed_size<kPairsIfAny>(problem)
                              : Tile::packed_size<Kind::kFloats>(problem);
}

template <Kind kKind>
void pack_block(const AttentionProblem& problem, const AttentionTask& task, float* scratch,
                float* packed) {
  Tile tile;
  Tile::lay_out(problem, scratch, tile);
  tile.length = length_of<kKind>(problem);
  tile.key_memory = packed;
  tile.value_memory = packed + tile.length * kBlockKeys;
  const int64_t head = task.head / problem.group();
  const int32_t count = std::min(kBlockKeys, task.k_len - task.n0);
  tile.load_keys<kKind>(HeadRows(problem.key, problem.dtype, task.key, head, problem.head_dim),
                        task.n0, count);
  tile.load_values<kKind>(
      HeadRows(problem.value, problem.dtype, task.value, head, problem.value_dim), task.n0, count);
}

void pack(const AttentionProblem& problem, const AttentionTask& task, float* scratch,
          float* packed) {
  if (takes_pairs(problem)) {
    pack_block<kPairsIfAny>(problem, task, scratch, packed);
  } else {
    pack_block<Kind::kFloats>(problem, task, scratch, packed);
  }
}

void run(const AttentionProblem& problem, const AttentionTask& task, float* scratch) {
  if (rows_of_kv_head(problem, task) <= kFewRows) {
    Forward<Kind::kRows>(problem, task, scratch).run();
  } else if (takes_pairs(problem)) {
    Forward<kPairsIfAny>(problem, task, scratch).run();
  } else {
    Forward<Kind::kFloats>(problem, task, scratch).run();
  }
}

}  // namespace

const AttentionForwardKernels attention_forward_kernels = {scratch_size, packed_size, pack, run};

}  // namespace pumice::cpu::PUMICE_ISA
