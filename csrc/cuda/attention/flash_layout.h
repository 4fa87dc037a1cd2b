// Where the rows of a sequence lie. Plain C++, 64-bit offsets throughout; tested on the host with
// tensors of more than 2^31 elements (tests/cuda/attention_plans.cpp).
#pragma once

#include "common/attention_problem.h"

namespace pumice::cuda {

// One sequence of the batch.
struct FlashSequence {
  int64_t batch;
  int64_t q_begin, k_begin;  // its first token in query, and in key and value; dense: 0
  int64_t q_token;           // its first token in the contiguous [tokens, H, D_v]
  int32_t q_len, k_len;
};

// Lengths on the device are cut at max_q and max_k, which the grid and the workspace were made for.
// Those of a paged cache's keys are in seq_lens; where keys lie is the block table's affair.
PUMICE_HOST_DEVICE FlashSequence flash_sequence(const AttentionProblem& problem, int64_t batch) {
  FlashSequence sequence;
  sequence.batch = batch;
  if (problem.seq_lens != nullptr) {
    const bool packed = problem.packed();
    const int32_t q_begin = packed ? problem.cu_seqlens_q[batch] : 0;
    const auto max_q = static_cast<int32_t>(problem.max_q);
    sequence.k_begin = 0;
    sequence.q_begin = q_begin;
    sequence.q_token = packed ? q_begin : batch * problem.max_q;
    sequence.q_len =
        packed ? larger(0, smaller(problem.cu_seqlens_q[batch + 1] - q_begin, max_q)) : max_q;
    sequence.k_len =
        larger(0, smaller(problem.seq_lens[batch], static_cast<int32_t>(problem.max_k)));
    return sequence;
  }
  if (!problem.packed()) {
    sequence.q_begin = sequence.k_begin = 0;
    sequence.q_token = batch * problem.max_q;
    sequence.q_len = static_cast<int32_t>(problem.max_q);
    sequence.k_len = static_cast<int32_t>(problem.max_k);
    return sequence;
  }
  const int32_t q_begin = problem.cu_seqlens_q[batch], k_begin = problem.cu_seqlens_k[batch];
  sequence.q_begin = sequence.q_token = q_begin;
  sequence.k_begin = k_begin;
  sequence.q_len = larger(
      0, smaller(problem.cu_seqlens_q[batch + 1] - q_begin, static_cast<int32_t>(problem.max_q)));
  sequence.k_len = larger(
      0, smaller(problem.cu_seqlens_k[batch + 1] - k_begin, static_cast<int32_t>(problem.max_k)));
  return sequence;
}

// Element 0 of a token of the sequence whose first token is `begin`.
PUMICE_HOST_DEVICE int64_t token_offset(const TokenView& view, int64_t batch, int64_t begin,
                                        int64_t token, int64_t head) {
  return batch * view.batch_stride + (begin + token) * view.token_stride + head * view.head_stride;
}

// Query i and head of a contiguous [tokens, H, dim].
PUMICE_HOST_DEVICE int64_t result_offset(const AttentionProblem& problem,
                                         const FlashSequence& sequence, int64_t i, int64_t head,
                                         int64_t dim) {
  return ((sequence.q_token + i) * problem.heads + head) * dim;
}

// The same of lse: [B, H, S_q], or [H, total_q] where packed.
PUMICE_HOST_DEVICE int64_t lse_offset(const AttentionProblem& problem,
                                      const FlashSequence& sequence, int64_t i, int64_t head) {
  return problem.packed() ? head * problem.total_q + sequence.q_token + i
                          : (sequence.batch * problem.heads + head) * problem.max_q + i;
}

}  // namespace pumice::cuda
