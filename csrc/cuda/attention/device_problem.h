// From checked operands to a problem with pointers that kernels can follow. Host code.
#pragma once

#include "common/attention_args.h"
#include "cuda/attention/flash_tiles.h"
#include "cuda/tensor_access.h"

namespace pumice::cuda {

inline void check_cuda_attention(const char* op, const AttentionProblem& problem) {
  PUMICE_CHECK(problem.head_dim <= kFlashMaxHeadDim && problem.value_dim <= kFlashMaxHeadDim, op,
               "head dims on CUDA must be at most ", kFlashMaxHeadDim, ", not ", problem.head_dim,
               " (query, key) and ", problem.value_dim, " (value)");
  // Rows of a tile are queries of all heads that share keys.
  PUMICE_CHECK(problem.max_q * problem.group() <= INT32_MAX / 2, op, problem.max_q, " queries of ",
               problem.group(), " heads for each of key and value are too many");
}

inline void set_device_pointers(AttentionProblem& problem, const AttentionTensors& tensors) {
  problem.query.data = read_pointer<void>(tensors.query);
  problem.key.data = read_pointer<void>(tensors.key);
  problem.value.data = read_pointer<void>(tensors.value);
  const auto words = [](const std::optional<Tensor>& tensor) {
    return tensor ? read_pointer<int32_t>(*tensor) : nullptr;
  };
  problem.cu_seqlens_q = words(tensors.cu_seqlens_q);
  problem.cu_seqlens_k = words(tensors.cu_seqlens_k);
  problem.mask.global_index = words(tensors.global_index);
  problem.mask.bits = reinterpret_cast<const uint32_t*>(words(tensors.mask_bits));
  problem.mask.blocks = tensors.mask_blocks ? read_pointer<uint8_t>(*tensors.mask_blocks) : nullptr;
  problem.score.alibi_slopes =
      tensors.alibi_slopes ? read_pointer<float>(*tensors.alibi_slopes) : nullptr;
  problem.score.sinks = tensors.sinks ? read_pointer<float>(*tensors.sinks) : nullptr;
}

}  // namespace pumice::cuda
