// What an attention kernel is asked, without torch: the operands' shapes and where they lie.
//
// Sizes: batch B, queries S_q, keys S_k, heads H, KV heads H_kv, head dim D, value dim D_v. Dense
// tensors are [B, S, H, D]; packed ones [total, H, D] with cu_seqlens, int32 [B + 1].
#pragma once

#include "common/attention_mask.h"
#include "common/attention_score.h"
#include "common/dtype.h"

namespace pumice {

// Where the vectors [token, head, 0 … D) of a tensor lie; strides in elements, that of the last
// dimension is 1.
struct TokenView {
  const void* data = nullptr;
  int64_t batch_stride = 0, token_stride = 0, head_stride = 0;
};

struct AttentionProblem {
  DType dtype;
  int64_t batch, heads, kv_heads, head_dim, value_dim;
  int64_t max_q, max_k;      // of any sequence
  int64_t total_q, total_k;  // B · S_q where dense
  TokenView query, key, value;
  const int32_t* cu_seqlens_q = nullptr;  // null: dense
  const int32_t* cu_seqlens_k = nullptr;
  const int32_t* seq_lens = nullptr;  // keys of each sequence, in a paged cache (paged_cache.h)
  AttentionMask mask;
  ScoreRule score;

  PUMICE_HOST_DEVICE_MEMBER bool packed() const { return cu_seqlens_q != nullptr; }
  PUMICE_HOST_DEVICE_MEMBER int64_t group() const { return heads / kv_heads; }
};

// One sequence of the problem: its lengths, and the index of its first tokens among all of them.
struct SequenceRange {
  int64_t query_row, key_row;
  int32_t q_len, k_len;
};

PUMICE_HOST_DEVICE SequenceRange sequence_of(const AttentionProblem& problem, int64_t batch) {
  if (problem.seq_lens != nullptr) {
    const int32_t k_len = problem.seq_lens[batch];
    if (!problem.packed()) {
      return {batch * problem.max_q, 0, static_cast<int32_t>(problem.max_q), k_len};
    }
    const int32_t q = problem.cu_seqlens_q[batch];
    return {q, 0, problem.cu_seqlens_q[batch + 1] - q, k_len};
  }
  if (!problem.packed()) {
    return {batch * problem.max_q, batch * problem.max_k, static_cast<int32_t>(problem.max_q),
            static_cast<int32_t>(problem.max_k)};
  }
  const int32_t q = problem.cu_seqlens_q[batch], k = problem.cu_seqlens_k[batch];
  return {q, k, problem.cu_seqlens_q[batch + 1] - q, problem.cu_seqlens_k[batch + 1] - k};
}

// Where the vector of a sequence's first token and one head lies in a view, whose tokens of all
// sequences follow each other from `row` where packed.
PUMICE_HOST_DEVICE int64_t first_element(const TokenView& view, bool packed, int64_t batch,
                                         int64_t row, int64_t head) {
  return (packed ? row * view.token_stride : batch * view.batch_stride) + head * view.head_stride;
}

// Where the row of a sequence and head begins in lse, [B, H, S_q] or [H, total] where packed.
PUMICE_HOST_DEVICE int64_t lse_row(const AttentionProblem& problem, const SequenceRange& sequence,
                                   int64_t batch, int64_t head) {
  return problem.packed() ? head * problem.total_q + sequence.query_row
                          : (batch * problem.heads + head) * problem.max_q;
}

}  // namespace pumice
