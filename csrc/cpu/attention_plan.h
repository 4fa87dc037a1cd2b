// How the operator cuts attention into tasks: by sequence, heads of one KV head, queries and, where
// that gives few tasks over many keys, by keys.
//
// A cut along keys changes the order of summation, so where it lies may depend on nothing but the
// sequence itself: a row's bits are the same in any batch and on any number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/attention_forward.h"
#include "cpu/workspace.h"

namespace pumice::cpu {

// Keys of a part, at least: the merge then is a thousandth of the work.
constexpr int64_t kPartKeys = 1024;
// Sequences with as many tasks as this are not cut along keys.
constexpr int64_t kEnoughTasks = 32;

// From so many tasks of one KV head on, its keys and values are packed once for all of them (which
// changes no bit): tokens lie heads apart, in as many pages, and each task would wait for them
// anew. With fewer, what is saved goes into memory touched for the first time.
constexpr int64_t kSharingTasks = 8;

// Few rows of a KV head wait for memory, where the keys of its heads lie side by side, token by
// token: a task then takes several KV heads along the keys together. At most so many, of so many
// bytes of a block of 64 keys and values (it and the next one stay within L2),
constexpr int64_t kJoinedHeads = 64;
constexpr int64_t kJoinedBytes = 1 << 18;
// of so many rows each (more do not wait),
constexpr int64_t kJoinedRows = 32;
// and leaving each thread so many tasks, if there are.
constexpr int64_t kTasksPerThread = 2;

struct SequencePlan {
  int64_t batch;
  int32_t q_len, k_len;
  int64_t query_row;  // of the first query among those of all sequences
  int64_t first_query,
      first_key;  // tokens, from the beginning of the batch or of the packed tensor
  int64_t first_task, tasks;
  int64_t joined;               // KV heads of a task
  int64_t parts, part_keys;     // along keys
  int64_t partial;              // index of its first partial row where parts > 1
  int64_t first_block, blocks;  // packed: of each KV head `blocks`, one head after the other; or 0
};

class AttentionPlan {
 public:
  // cache: where keys lie, or null.
  AttentionPlan(const AttentionProblem& problem, const PagedCache* cache, int64_t threads)
      : problem_(problem) {
    // Heads of a KV head share its keys as rows of one task, unless each has a mask of its own.
    heads_ = problem.mask.bits_head_stride != 0 ? 1 : std::min<int64_t>(problem.group(), kTaskRows);
    queries_ = kTaskRows / heads_;
    head_chunks_ = problem.kv_heads * ceil_div(problem.group(), heads_);
    for (int64_t b = 0; b < problem.batch; ++b) add(b);
    join_heads(cache, threads);
  }

  int64_t tasks() const { return tasks_; }
  int64_t partial_rows() const { return partial_rows_; }
  int64_t packed_blocks() const { return packed_blocks_; }
  const std::vector<SequencePlan>& sequences() const { return sequences_; }

  const SequencePlan& sequence_of_task(int64_t task) const {
    return sequence_of(task, &SequencePlan::first_task);
  }
  const SequencePlan& sequence_of_block(int64_t block) const {
    return sequence_of(block, &SequencePlan::first_block);
  }

  // What to pack as block `index`, and which block that makes: heads follow each other as in the
  // tensor, where those of a token lie side by side, but a head's blocks shall.
  int64_t describe_block(const SequencePlan& sequence, int64_t index, AttentionTask& task) const {
    index -= sequence.first_block;
    const int64_t head = index % problem_.kv_heads, block = index / problem_.kv_heads;
    task.head = head * problem_.group();
    task.k_len = sequence.k_len;
    task.n0 = static_cast<int32_t>(block * 64);
    place(sequence, task);
    return first_block(sequence, task.head) + block;
  }

  // Of the keys of a head's KV head.
  int64_t first_block(const SequencePlan& sequence, int64_t head) const {
    return sequence.first_block + head / problem_.group() * sequence.blocks;
  }

  // The task without its outputs, and which part of the keys it is.
  int64_t describe(const SequencePlan& sequence, int64_t index, AttentionTask& task) const {
    index -= sequence.first_task;
    // Heads follow each other over the same keys, which lie side by side, token by token: what one
    // head has made the processor fetch and translate (lines nearby, pages) serves the next.
    const int64_t chunks = head_chunks_ / problem_.kv_heads;
    const int64_t columns =
        sequence.joined > 1 ? ceil_div(problem_.kv_heads, sequence.joined) : head_chunks_;
    const int64_t chunk = index % columns;
    index /= columns;
    const int64_t part = index % sequence.parts, blocks = ceil_div(sequence.q_len, queries_);
    // The last queries first: under a causal mask they see most, and short tasks at the end leave
    // no thread waiting.
    const int64_t block = blocks - 1 - index / sequence.parts;
    const int64_t in_group = chunk % chunks * heads_;
    task.batch = sequence.batch;
    task.head = chunk / chunks * sequence.joined * problem_.group() + in_group;
    task.heads = static_cast<int32_t>(
        sequence.joined > 1 ? std::min(heads_ * sequence.joined, problem_.heads - task.head)
                            : std::min(heads_, problem_.group() - in_group));
    task.query_row = sequence.query_row;
    task.q_len = sequence.q_len;
    task.k_len = sequence.k_len;
    task.m0 = static_cast<int32_t>(block * queries_);
    task.m1 = static_cast<int32_t>(std::min<int64_t>(task.m0 + queries_, sequence.q_len));
    task.n0 = static_cast<int32_t>(part * sequence.part_keys);
    task.n1 = static_cast<int32_t>(std::min<int64_t>(task.n0 + sequence.part_keys, sequence.k_len));
    place(sequence, task);
    return part;
  }

 private:
  // The last sequence that begins at or before `index`: none there is left that holds nothing.
  const SequencePlan& sequence_of(int64_t index, int64_t SequencePlan::* first) const {
    const auto after = std::upper_bound(
        sequences_.begin(), sequences_.end(), index,
        [&](int64_t value, const SequencePlan& sequence) { return value < sequence.*first; });
    return *(after - 1);
  }

  void place(const SequencePlan& sequence, AttentionTask& task) const {
    const auto offset = [&](const TokenView& view, int64_t token) {
      return (problem_.packed() ? 0 : sequence.batch * view.batch_stride) +
             token * view.token_stride;
    };
    task.query = offset(problem_.query, sequence.first_query);
    task.key = offset(problem_.key, sequence.first_key);
    task.value = offset(problem_.value, sequence.first_key);
  }

  // Whether most tasks see most keys. Of a paged cache, no page is read that nothing sees.
  bool shares_keys() const {
    const AttentionMask& mask = problem_.mask;
    return problem_.seq_lens == nullptr && mask.bits == nullptr &&
           mask.window_left == kUnboundedWindow && mask.window_right == kUnboundedWindow;
  }

  void add(int64_t b) {
    SequencePlan sequence{};
    sequence.batch = b;
    const SequenceRange range = pumice::sequence_of(problem_, b);
    sequence.query_row = range.query_row;
    if (problem_.packed()) {
      sequence.first_query = range.query_row;
      sequence.first_key = range.key_row;
    }
    sequence.q_len = range.q_len;
    sequence.k_len = range.k_len;
    if (sequence.q_len == 0) return;
    const int64_t whole = ceil_div(sequence.q_len, queries_) * head_chunks_;
    const int64_t wanted = std::min(ceil_div(kEnoughTasks, whole), sequence.k_len / kPartKeys);
    sequence.part_keys = std::max<int64_t>(kPartKeys, sequence.k_len);
    if (wanted > 1) sequence.part_keys = ceil_div(ceil_div(sequence.k_len, wanted), 64) * 64;
    sequence.parts = std::max<int64_t>(1, ceil_div(sequence.k_len, sequence.part_keys));
    sequence.joined = 1;
    sequence.tasks = whole * sequence.parts;
    sequence.first_task = tasks_;
    tasks_ += sequence.tasks;
    sequence.partial = partial_rows_;
    if (sequence.parts > 1) partial_rows_ += sequence.parts * sequence.q_len * problem_.heads;
    sequence.first_block = packed_blocks_;
    if (whole >= kSharingTasks * problem_.kv_heads && shares_keys()) {
      sequence.blocks = ceil_div(sequence.k_len, 64);
      packed_blocks_ += sequence.blocks * problem_.kv_heads;
    }
    sequences_.push_back(sequence);
  }

  // As many KV heads to a task as the constants above allow, in a plan that has one to each.
  void join_heads(const PagedCache* cache, int64_t threads) {
    if (head_chunks_ != problem_.kv_heads || problem_.mask.bits_head_stride != 0) return;
    const bool side_by_side = cache != nullptr
                                  ? cache->key.head_stride < cache->key.slot_stride
                                  : problem_.key.head_stride < problem_.key.token_stride;
    if (!side_by_side) return;
    const bool bytes = cache != nullptr && cache->type != CacheType::kQuery;
    const int64_t size = bytes ? 1 : size_of(problem_.dtype);
    const int64_t head_bytes = 64 * (problem_.head_dim + problem_.value_dim) * size;
    const int64_t most =
        std::min({kJoinedHeads, kJoinedBytes / head_bytes, tasks_ / (threads * kTasksPerThread)});
    if (most <= 1) return;
    tasks_ = 0;
    for (SequencePlan& sequence : sequences_) {
      const int64_t rows = sequence.q_len * heads_;
      if (rows <= kJoinedRows) {
        const int64_t tasks = ceil_div(problem_.kv_heads, std::min(most, kTaskRows / rows));
        sequence.joined = ceil_div(problem_.kv_heads, tasks);
        sequence.tasks = sequence.parts * ceil_div(problem_.kv_heads, sequence.joined);
      }
      sequence.first_task = tasks_;
      tasks_ += sequence.tasks;
    }
  }

  const AttentionProblem& problem_;
  int64_t heads_, queries_, head_chunks_;
  int64_t tasks_ = 0, partial_rows_ = 0, packed_blocks_ = 0;
  std::vector<SequencePlan> sequences_;
};

}  // namespace pumice::cpu
