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

struct SequencePlan {
  int64_t batch;
  int32_t q_len, k_len;
  int64_t query_row;  // of the first query among those of all sequences
  int64_t first_query,
      first_key;  // tokens, from the beginning of the batch or of the packed tensor
  int64_t first_task;
  int64_t parts, part_keys;     // along keys
  int64_t partial;              // index of its first partial row where parts > 1
  int64_t first_block, blocks;  // packed: of each KV head `blocks`, one head after the other; or 0
};

class AttentionPlan {
 public:
  explicit AttentionPlan(const AttentionProblem& problem) : problem_(problem) {
    // Heads of a KV head share its keys as rows of one task, unless each has a mask of its own.
    heads_ = problem.mask.bits_head_stride != 0 ? 1 : std::min<int64_t>(problem.group(), kTaskRows);
    queries_ = kTaskRows / heads_;
    head_chunks_ = problem.kv_heads * ceil_div(problem.group(), heads_);
    for (int64_t b = 0; b < problem.batch; ++b) add(b);
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
    const int64_t chunk = index % head_chunks_;
    index /= head_chunks_;
    const int64_t part = index % sequence.parts, blocks = ceil_div(sequence.q_len, queries_);
    // The last queries first: under a causal mask they see most, and short tasks at the end leave
    // no thread waiting.
    const int64_t block = blocks - 1 - index / sequence.parts;
    const int64_t chunks = head_chunks_ / problem_.kv_heads;
    const int64_t in_group = chunk % chunks * heads_;
    task.batch = sequence.batch;
    task.head = chunk / chunks * problem_.group() + in_group;
    task.heads = static_cast<int32_t>(std::min(heads_, problem_.group() - in_group));
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
    sequence.first_task = tasks_;
    tasks_ += whole * sequence.parts;
    sequence.partial = partial_rows_;
    if (sequence.parts > 1) partial_rows_ += sequence.parts * sequence.q_len * problem_.heads;
    sequence.first_block = packed_blocks_;
    if (whole >= kSharingTasks * problem_.kv_heads && shares_keys()) {
      sequence.blocks = ceil_div(sequence.k_len, 64);
      packed_blocks_ += sequence.blocks * problem_.kv_heads;
    }
    sequences_.push_back(sequence);
  }

  const AttentionProblem& problem_;
  int64_t heads_, queries_, head_chunks_;
  int64_t tasks_ = 0, partial_rows_ = 0, packed_blocks_ = 0;
  std::vector<SequencePlan> sequences_;
};

}  // namespace pumice::cpu
