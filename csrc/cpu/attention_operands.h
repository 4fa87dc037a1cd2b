// The operands of the attention operators on the CPU: pointers into the checked problem, and the
// offsets of packed sequences, which only here can be looked at.
#pragma once

#include "common/attention_args.h"

namespace pumice::cpu {

inline const int32_t* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const int32_t*>(tensor->const_data_ptr()) : nullptr;
}

inline void check_offsets(const char* op, const char* name, const int32_t* offsets, int64_t batch,
                          int64_t total, int64_t longest) {
  PUMICE_CHECK(offsets[0] >= 0 && offsets[batch] <= total, op, name,
               " must lie between 0 and the number of tokens, ", total, ", not between ",
               offsets[0], " and ", offsets[batch]);
  for (int64_t b = 0; b < batch; ++b) {
    PUMICE_CHECK(offsets[b] <= offsets[b + 1], op, name, " must not descend, as from ", offsets[b],
                 " to ", offsets[b + 1]);
    PUMICE_CHECK(int64_t{offsets[b + 1]} - offsets[b] <= longest, op, name, " hold a sequence of ",
                 offsets[b + 1] - offsets[b], " tokens, more than its max_seqlen, ", longest);
  }
}

// The problem with its pointers.
inline AttentionProblem attention_problem(const char* op, AttentionTensors& tensors,
                                          const AttentionOptions& options) {
  AttentionProblem problem = check_attention(op, tensors, options);
  problem.query.data = tensors.query.const_data_ptr();
  problem.key.data = tensors.key.const_data_ptr();
  problem.value.data = tensors.value.const_data_ptr();
  problem.cu_seqlens_q = data_of(tensors.cu_seqlens_q);
  problem.cu_seqlens_k = data_of(tensors.cu_seqlens_k);
  problem.mask.global_index = data_of(tensors.global_index);
  if (tensors.mask_bits) {
    problem.mask.bits = static_cast<const uint32_t*>(tensors.mask_bits->const_data_ptr());
    problem.mask.blocks = static_cast<const uint8_t*>(tensors.mask_blocks->const_data_ptr());
  }
  if (tensors.alibi_slopes) {
    problem.score.alibi_slopes = tensors.alibi_slopes->const_data_ptr<float>();
  }
  if (tensors.sinks) problem.score.sinks = tensors.sinks->const_data_ptr<float>();
  if (problem.packed()) {
    check_offsets(op, "cu_seqlens_q", problem.cu_seqlens_q, problem.batch, problem.total_q,
                  problem.max_q);
    check_offsets(op, "cu_seqlens_k", problem.cu_seqlens_k, problem.batch, problem.total_k,
                  problem.max_k);
  }
  return problem;
}

}  // namespace pumice::cpu
