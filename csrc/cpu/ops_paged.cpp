// paged_attention, cache_append and cache_copy_blocks on the CPU: arguments and their values, which
// only here can be looked at. Attention itself is that over contiguous keys (attention_run.h).
#include <algorithm>
#include <cstring>
#include <vector>

#include "common/paged_args.h"
#include "cpu/attention_operands.h"
#include "cpu/attention_run.h"
#include "cpu/dispatch.h"
#include "cpu/workspace.h"

namespace pumice::cpu {
namespace {

using torch::stable::new_empty;

const float* floats_of(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

const int64_t* longs_of(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<int64_t>() : nullptr;
}

void set_pointers(const PagedTensors& tensors, PagedProblem& problem) {
  AttentionProblem& attention = problem.attention;
  attention.query.data = tensors.query.const_data_ptr();
  attention.cu_seqlens_q = data_of(tensors.cu_seqlens_q);
  attention.seq_lens = data_of(tensors.seq_lens);
  attention.score.sinks = floats_of(tensors.sinks);
  attention.score.alibi_slopes = floats_of(tensors.alibi_slopes);
  if (tensors.tree_mask) {
    attention.mask.bits = static_cast<const uint32_t*>(tensors.tree_mask->const_data_ptr());
  }
  PagedCache& cache = problem.cache;
  cache.key.data = tensors.key_cache.const_data_ptr();
  cache.value.data = tensors.value_cache.const_data_ptr();
  cache.block_table = data_of(tensors.block_table);
  cache.key_scale = floats_of(tensors.k_scale);
  cache.value_scale = floats_of(tensors.v_scale);
}

// The entries of the table that will be read, those of blocks that some query may see.
void check_table(const char* op, const AttentionProblem& problem, const PagedCache& cache) {
  for (int64_t b = 0; b < problem.batch; ++b) {
    const int32_t length = problem.seq_lens[b];
    PUMICE_CHECK(length >= 0 && length <= problem.max_k, op, "seq_lens[", b, "] must be from 0 to ",
                 problem.max_k, ", what a row of block_table holds, not ", length);
    const SequenceRange sequence = sequence_of(problem, b);
    if (sequence.q_len == 0 || sequence.k_len == 0) continue;
    const MaskView mask =
        mask_view(problem.mask, b, 0, sequence.q_len, sequence.k_len, sequence.query_row);
    const BlockWalk walk = mask.keys_of(0, sequence.q_len, cache.block_size);
    const int32_t end = walk.block_end();
    for (int32_t n = walk.next(0); n < end; n = walk.next(n + 1)) {
      const int32_t block = cache.block_table[b * cache.max_blocks + n];
      PUMICE_CHECK(block >= 0 && block < cache.num_blocks, op, "block_table[", b, ", ", n,
                   "] must be a block from 0 to ", cache.num_blocks - 1, ", not ", block);
    }
  }
}

std::tuple<Tensor, Tensor> paged_attention(
    Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens,
    std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> sinks,
    std::optional<Tensor> alibi_slopes, std::optional<Tensor> tree_mask,
    std::optional<Tensor> k_scale, std::optional<Tensor> v_scale, int64_t max_seqlen_q,
    double softmax_scale, bool causal, int64_t window_left, int64_t window_right,
    int64_t sink_tokens, double softcap) {
  const char* op = "pumice::paged_attention";
  PagedTensors tensors{query, key_cache,    value_cache, block_table, seq_lens, cu_seqlens_q,
                       sinks, alibi_slopes, tree_mask,   k_scale,     v_scale};
  PagedProblem problem = check_paged_attention(
      op, tensors,
      {max_seqlen_q, softmax_scale, causal, window_left, window_right, sink_tokens, softcap});
  set_pointers(tensors, problem);
  const AttentionProblem& attention = problem.attention;
  if (attention.packed()) {
    check_offsets(op, "cu_seqlens_q", attention.cu_seqlens_q, attention.batch, attention.total_q,
                  attention.max_q);
  }
  check_table(op, attention, problem.cache);
  Tensor out = new_empty(query, shape_with_last(query, attention.value_dim), query.scalar_type());
  Tensor lse = attention.packed()
                   ? new_empty(query, {attention.heads, attention.total_q}, ScalarType::Float)
                   : new_empty(query, {attention.batch, attention.heads, attention.max_q},
                               ScalarType::Float);
  attention_forward(attention, &problem.cache, out, lse);
  return {out, lse};
}

void cache_append(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache,
                  Tensor slot_mapping, std::optional<Tensor> k_scale, std::optional<Tensor> v_scale,
                  std::optional<Tensor> cos, std::optional<Tensor> sin,
                  std::optional<Tensor> positions, bool interleaved) {
  const char* op = "pumice::cache_append";
  AppendTensors tensors{key,     value,   key_cache, value_cache, slot_mapping,
                        k_scale, v_scale, cos,       sin,         positions};
  AppendProblem problem = check_append(op, tensors);
  CacheAppend job{};
  job.dtype = problem.dtype;
  job.kv_heads = problem.kv_heads;
  job.head_dim = problem.head_dim;
  job.value_dim = problem.value_dim;
  job.key = problem.key;
  job.key.data = tensors.key.const_data_ptr();
  job.value = problem.value;
  job.value.data = tensors.value.const_data_ptr();
  job.cache = problem.cache;
  job.cache.key_scale = floats_of(tensors.k_scale);
  job.cache.value_scale = floats_of(tensors.v_scale);
  job.key_cache = key_cache.mutable_data_ptr();
  job.value_cache = value_cache.mutable_data_ptr();
  job.slots = slot_mapping.const_data_ptr<int64_t>();
  job.rotary_pairs = problem.rotary_pairs;
  job.interleaved = interleaved;
  job.cos = floats_of(tensors.cos);
  job.sin = floats_of(tensors.sin);
  job.positions = longs_of(tensors.positions);
  const int64_t slots = problem.cache.num_blocks * problem.cache.block_size;
  for (int64_t t = 0; t < problem.tokens; ++t) {
    if (job.slots[t] < 0) continue;
    PUMICE_CHECK(job.slots[t] < slots, op, "slot_mapping[", t, "] must be below the cache's ",
                 slots, " slots, not ", job.slots[t]);
    PUMICE_CHECK(
        job.rotary_pairs == 0 || (job.positions[t] >= 0 && job.positions[t] < problem.max_position),
        op, "positions[", t, "] must be from 0 to ", problem.max_position - 1,
        ", the rows of cos, not ", job.positions[t]);
  }
  for_rows(problem.tokens, problem.kv_heads * (problem.head_dim + problem.value_dim),
           [&](int64_t begin, int64_t end) { paged_kernels().append(job, begin, end); });
}

// Blocks of a cache as bytes.
class BlockCopies {
 public:
  explicit BlockCopies(Tensor& cache) : view_(cache_view(cache)), size_(cache.element_size()) {
    data_ = static_cast<char*>(cache.mutable_data_ptr());
    slots_ = cache.size(1);
    heads_ = cache.size(2);
    row_ = cache.size(3);
    dense_ = view_.head_stride == row_ && view_.slot_stride == heads_ * row_;
  }

  int64_t block_elements() const { return slots_ * heads_ * row_; }

  void copy(int64_t from, int64_t to) const {
    if (dense_) return copy_elements(view_.at(from, 0, 0), view_.at(to, 0, 0), block_elements());
    for (int32_t slot = 0; slot < slots_; ++slot) {
      for (int64_t h = 0; h < heads_; ++h) {
        copy_elements(view_.at(from, slot, h), view_.at(to, slot, h), row_);
      }
    }
  }

 private:
  void copy_elements(int64_t from, int64_t to, int64_t count) const {
    std::memcpy(data_ + to * size_, data_ + from * size_, static_cast<size_t>(count * size_));
  }

  const CacheView view_;
  const int64_t size_;
  char* data_;
  int64_t slots_, heads_, row_;
  bool dense_;
};

void cache_copy_blocks(Tensor key_cache, Tensor value_cache, Tensor pairs) {
  const char* op = "pumice::cache_copy_blocks";
  check_copy_blocks(op, key_cache, value_cache, pairs);
  const int64_t count = pairs.size(0), blocks = key_cache.size(0);
  const int64_t* pair = pairs.const_data_ptr<int64_t>();
  std::vector<int64_t> written;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t from = pair[2 * i], to = pair[2 * i + 1];
    if (from < 0) continue;
    PUMICE_CHECK(from < blocks && to >= 0 && to < blocks, op, "pairs[", i,
                 "] must be blocks from 0 to ", blocks - 1, ", not (", from, ", ", to, ")");
    written.push_back(to);
  }
  std::sort(written.begin(), written.end());
  const auto twice = std::adjacent_find(written.begin(), written.end());
  PUMICE_CHECK(twice == written.end(), op, "block ", twice == written.end() ? 0 : *twice,
               " is the destination of two pairs");
  for (int64_t i = 0; i < count; ++i) {
    const int64_t from = pair[2 * i];
    if (from < 0 || from == pair[2 * i + 1]) continue;
    PUMICE_CHECK(!std::binary_search(written.begin(), written.end(), from), op, "block ", from,
                 " is the source of one pair and the destination of another");
  }
  const BlockCopies keys(key_cache), values(value_cache);
  for_rows(count, std::max<int64_t>(1, keys.block_elements() + values.block_elements()),
           [&](int64_t begin, int64_t end) {
             for (int64_t i = begin; i < end; ++i) {
               const int64_t from = pair[2 * i], to = pair[2 * i + 1];
               if (from < 0 || from == to) continue;
               keys.copy(from, to);
               values.copy(from, to);
             }
           });
}

}  // namespace

PUMICE_CPU_IMPL(m) {
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("cache_append", TORCH_BOX(&cache_append));
  m.impl("cache_copy_blocks", TORCH_BOX(&cache_copy_blocks));
}

}  // namespace pumice::cpu
