// Checked arguments of the attention operators, shared by the CPU and CUDA entry points.
#pragma once

#include "common/args.h"
#include "common/attention_problem.h"

namespace pumice {

// The keyword arguments of the operators' schema.
struct AttentionOptions {
  int64_t max_seqlen_q, max_seqlen_k;
  double softmax_scale;
  bool causal;
  int64_t window_left, window_right, sink_tokens, global_tokens;
  double softcap;
};

// The operands, whose pointers the entry point puts into the problem: those of the tensors
// themselves on the CPU, those of the device on CUDA.
struct AttentionTensors {
  Tensor query, key, value;
  std::optional<Tensor> cu_seqlens_q, cu_seqlens_k, sinks, alibi_slopes, global_index, mask_bits,
      mask_blocks;
};

inline int32_t window_side(int64_t size) {
  return size < 0 || size >= kUnboundedWindow ? kUnboundedWindow : static_cast<int32_t>(size);
}

inline void check_int32(const char* op, const char* name, const Tensor& tensor,
                        const Tensor& like) {
  PUMICE_CHECK(tensor.scalar_type() == ScalarType::Int, op, name, " must be int32");
  PUMICE_CHECK(same_device(tensor, like), op, name, " must be on the device of query");
  PUMICE_CHECK(tensor.is_contiguous(), op, name, " must be contiguous");
}

// With the last dimension contiguous, for the kernels read vectors.
inline Tensor with_unit_stride(const Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) == 1 ? x : torch::stable::contiguous(x);
}

inline TokenView token_view(const Tensor& x) {
  if (x.dim() == 3) return {nullptr, 0, x.stride(0), x.stride(1)};
  return {nullptr, x.stride(0), x.stride(1), x.stride(2)};
}

// The mask's shape, without its pointers.
inline AttentionMask check_attention_mask(const char* op, const AttentionTensors& tensors,
                                          const AttentionOptions& options,
                                          const AttentionProblem& problem) {
  AttentionMask mask;
  mask.causal = options.causal;
  mask.window_left = window_side(options.window_left);
  mask.window_right = window_side(options.window_right);
  PUMICE_CHECK(options.sink_tokens >= 0 && options.sink_tokens <= kMaxSequence &&
                   options.global_tokens >= 0 && options.global_tokens <= kMaxSequence,
               op, "sink_tokens and global_tokens must be in [0, 2^29)");
  mask.sink_tokens = static_cast<int32_t>(options.sink_tokens);
  mask.global_tokens = static_cast<int32_t>(options.global_tokens);
  if (tensors.global_index) {
    const Tensor& index = *tensors.global_index;
    check_int32(op, "global_index", index, tensors.query);
    PUMICE_CHECK(index.dim() == 1 || (index.dim() == 2 && index.size(0) == problem.batch), op,
                 "global_index must have shape [G] or [B, G]");
    mask.global_count = static_cast<int32_t>(index.size(-1));
    mask.global_batch_stride = index.dim() == 2 ? index.size(1) : 0;
  }
  PUMICE_CHECK(tensors.mask_bits.has_value() == tensors.mask_blocks.has_value(), op,
               "mask_bits and mask_blocks belong together");
  if (tensors.mask_bits) {
    PUMICE_CHECK(!tensors.cu_seqlens_q, op, "mask_bits need dense sequences, not cu_seqlens");
    const Tensor &bits = *tensors.mask_bits, &blocks = *tensors.mask_blocks;
    check_int32(op, "mask_bits", bits, tensors.query);
    PUMICE_CHECK(blocks.scalar_type() == ScalarType::Byte && blocks.is_contiguous() &&
                     same_device(blocks, bits),
                 op, "mask_blocks must be uint8, contiguous and on the device of mask_bits");
    const int64_t words = (problem.max_k + 31) / 32;
    const int64_t block_rows = (problem.max_q + kMaskBlock - 1) / kMaskBlock;
    const int64_t block_columns = (problem.max_k + kMaskBlock - 1) / kMaskBlock;
    PUMICE_CHECK(bits.dim() == 4 && blocks.dim() == 4 &&
                     (bits.size(0) == 1 || bits.size(0) == problem.batch) &&
                     (bits.size(1) == 1 || bits.size(1) == problem.heads) &&
                     blocks.size(0) == bits.size(0) && blocks.size(1) == bits.size(1) &&
                     bits.size(2) == problem.max_q && bits.size(3) == words &&
                     blocks.size(2) == block_rows && blocks.size(3) == block_columns,
                 op, "mask_bits must have shape [B or 1, H or 1, S_q, ceil(S_k/32)], mask_blocks [",
                 "the same, ceil(S_q/64), ceil(S_k/64)]");
    const int64_t bits_matrix = problem.max_q * words, blocks_matrix = block_rows * block_columns;
    mask.bits_head_stride = bits.size(1) == 1 ? 0 : bits_matrix;
    mask.bits_batch_stride = bits.size(0) == 1 ? 0 : bits.size(1) * bits_matrix;
    mask.blocks_head_stride = bits.size(1) == 1 ? 0 : blocks_matrix;
    mask.blocks_batch_stride = bits.size(0) == 1 ? 0 : bits.size(1) * blocks_matrix;
    mask.bits_row_words = static_cast<int32_t>(words);
    mask.block_columns = static_cast<int32_t>(block_columns);
  }
  return mask;
}

// What makes a score of a product, without its pointers.
inline void check_score(const char* op, const std::optional<Tensor>& sinks,
                        const std::optional<Tensor>& alibi_slopes, double softmax_scale,
                        double softcap, const Tensor& query, AttentionProblem& problem) {
  PUMICE_CHECK(softcap >= 0, op, "softcap must not be negative");
  problem.score.softmax_scale = static_cast<float>(softmax_scale);
  problem.score.softcap = static_cast<float>(softcap);
  if (sinks) {
    check_vector(op, "sinks", *sinks, problem.heads, query);
    check_float32(op, "sinks", *sinks);
  }
  if (alibi_slopes) {
    const Tensor& slopes = *alibi_slopes;
    check_float32(op, "alibi_slopes", slopes);
    PUMICE_CHECK(slopes.is_contiguous() && same_device(slopes, query) &&
                     slopes.size(-1) == problem.heads &&
                     (slopes.dim() == 1 || (slopes.dim() == 2 && slopes.size(0) == problem.batch)),
                 op, "alibi_slopes must have shape [H] or [B, H], on the device of query");
    problem.score.alibi_batch_stride = slopes.dim() == 2 ? problem.heads : 0;
  }
}

// The problem without its pointers. `tensors` come back with the strides that the kernels need.
inline AttentionProblem check_attention(const char* op, AttentionTensors& tensors,
                                        const AttentionOptions& options) {
  tensors.query = with_unit_stride(tensors.query);
  tensors.key = with_unit_stride(tensors.key);
  tensors.value = with_unit_stride(tensors.value);
  const Tensor &query = tensors.query, &key = tensors.key, &value = tensors.value;
  const bool packed = tensors.cu_seqlens_q.has_value();
  PUMICE_CHECK(packed == tensors.cu_seqlens_k.has_value(), op,
               "cu_seqlens_q and cu_seqlens_k belong together");
  const int64_t dims = packed ? 3 : 4;
  PUMICE_CHECK(query.dim() == dims && key.dim() == dims && value.dim() == dims, op,
               "query, key and value must have ", dims, " dimensions");
  PUMICE_CHECK(is_floating_activation(query.scalar_type()), op,
               "query must be float32, float16 or bfloat16");
  PUMICE_CHECK(key.scalar_type() == query.scalar_type() &&
                   value.scalar_type() == query.scalar_type() && same_device(key, query) &&
                   same_device(value, query),
               op, "query, key and value must be of one dtype and on one device");
  AttentionProblem problem{};
  problem.dtype = to_dtype(query.scalar_type());
  problem.heads = query.size(-2);
  problem.kv_heads = key.size(-2);
  problem.head_dim = query.size(-1);
  problem.value_dim = value.size(-1);
  PUMICE_CHECK(problem.heads >= 1 && problem.kv_heads >= 1 &&
                   problem.heads % problem.kv_heads == 0 && value.size(-2) == problem.kv_heads,
               op, "heads of query must be a multiple of those of key and value");
  PUMICE_CHECK(problem.head_dim >= 1 && problem.value_dim >= 1 && key.size(-1) == problem.head_dim,
               op, "query and key must have one head dim, at least 1, and value one of at least 1");
  PUMICE_CHECK(key.size(0) == value.size(0) && (packed || key.size(1) == value.size(1)), op,
               "key and value must have one length");
  if (packed) {
    const Tensor &cu_q = *tensors.cu_seqlens_q, &cu_k = *tensors.cu_seqlens_k;
    check_int32(op, "cu_seqlens_q", cu_q, query);
    check_int32(op, "cu_seqlens_k", cu_k, query);
    PUMICE_CHECK(
        cu_q.dim() == 1 && cu_k.dim() == 1 && cu_q.size(0) >= 1 && cu_q.size(0) == cu_k.size(0), op,
        "cu_seqlens_q and cu_seqlens_k must be vectors of B + 1 elements");
    problem.batch = cu_q.size(0) - 1;
    problem.max_q = options.max_seqlen_q;
    problem.max_k = options.max_seqlen_k;
    problem.total_q = query.size(0);
    problem.total_k = key.size(0);
  } else {
    PUMICE_CHECK(query.size(0) == key.size(0), op, "query and key must have one batch size");
    problem.batch = query.size(0);
    problem.max_q = query.size(1);
    problem.max_k = key.size(1);
    problem.total_q = problem.batch * problem.max_q;
    problem.total_k = problem.batch * problem.max_k;
  }
  PUMICE_CHECK(problem.max_q >= 0 && problem.max_k >= 0 && problem.max_q <= kMaxSequence &&
                   problem.max_k <= kMaxSequence,
               op, "sequences must be shorter than 2^29");
  problem.query = token_view(query);
  problem.key = token_view(key);
  problem.value = token_view(value);
  problem.mask = check_attention_mask(op, tensors, options, problem);
  check_score(op, tensors.sinks, tensors.alibi_slopes, options.softmax_scale, options.softcap,
              query, problem);
  return problem;
}

}  // namespace pumice
