// Checked arguments of paged_attention, cache_append and cache_copy_blocks, shared by the CPU and
// CUDA entry points.
#pragma once

#include "common/attention_args.h"
#include "common/paged_cache.h"

namespace pumice {

// The keyword arguments of paged_attention's schema.
struct PagedOptions {
  int64_t max_seqlen_q;
  double softmax_scale;
  bool causal;
  int64_t window_left, window_right, sink_tokens;
  double softcap;
};

struct PagedTensors {
  Tensor query, key_cache, value_cache, block_table, seq_lens;
  std::optional<Tensor> cu_seqlens_q, sinks, alibi_slopes, tree_mask, k_scale, v_scale;
};

inline CacheView cache_view(const Tensor& cache) {
  return {nullptr, cache.stride(0), cache.stride(1), cache.stride(2)};
}

// What a cache stores of operands of type `dtype`.
inline CacheType check_cache_type(const char* op, const char* operand, ScalarType dtype,
                                  ScalarType stored) {
  if (stored == ScalarType::Float8_e4m3fn) return CacheType::kFloat8E4M3;
  if (stored == ScalarType::Char) return CacheType::kInt8;
  PUMICE_CHECK(stored == dtype, op, "key_cache and value_cache must be of the dtype of ", operand,
               ", float8_e4m3fn or int8");
  return CacheType::kQuery;
}

// Scales of a cache's heads; whether there must be any follows from its type.
inline int64_t check_cache_scale(const char* op, const char* name,
                                 const std::optional<Tensor>& scale, CacheType type,
                                 int64_t kv_heads, const Tensor& like) {
  PUMICE_CHECK(scale.has_value() == (type != CacheType::kQuery), op, name,
               type == CacheType::kQuery ? " is for a float8_e4m3fn or int8 cache"
                                         : " is needed by a float8_e4m3fn or int8 cache");
  if (!scale) return 0;
  check_float32(op, name, *scale);
  PUMICE_CHECK(scale->dim() == 1 && (scale->size(0) == 1 || scale->size(0) == kv_heads) &&
                   scale->is_contiguous() && same_device(*scale, like),
               op, name, " must have shape [1] or [H_kv], on the device of the cache");
  return scale->size(0) == 1 ? 0 : 1;
}

// Shapes and strides of a pair of caches [num_blocks, block_size, H_kv, D or D_v].
inline PagedCache check_caches(const char* op, const Tensor& key_cache, const Tensor& value_cache) {
  PUMICE_CHECK(key_cache.dim() == 4 && value_cache.dim() == 4, op,
               "key_cache and value_cache must have shape [num_blocks, block_size, H_kv, D]");
  PUMICE_CHECK(
      key_cache.scalar_type() == value_cache.scalar_type() && same_device(key_cache, value_cache),
      op, "key_cache and value_cache must be of one dtype and on one device");
  PUMICE_CHECK(value_cache.size(0) == key_cache.size(0) &&
                   value_cache.size(1) == key_cache.size(1) &&
                   value_cache.size(2) == key_cache.size(2),
               op, "key_cache and value_cache must have one shape but for the last dimension");
  PUMICE_CHECK(key_cache.size(1) >= 1 && key_cache.size(1) <= kMaxSequence &&
                   key_cache.size(2) >= 1 && key_cache.size(3) >= 1 && value_cache.size(3) >= 1,
               op, "block_size, H_kv, D and D_v must be at least 1, block_size below 2^29");
  PUMICE_CHECK((key_cache.stride(3) == 1 || key_cache.size(3) == 1) &&
                   (value_cache.stride(3) == 1 || value_cache.size(3) == 1),
               op, "the last dimension of key_cache and value_cache must be contiguous");
  PagedCache cache;
  cache.key = cache_view(key_cache);
  cache.value = cache_view(value_cache);
  cache.num_blocks = key_cache.size(0);
  cache.block_size = static_cast<int32_t>(key_cache.size(1));
  return cache;
}

struct PagedProblem {
  AttentionProblem attention;  // whose seq_lens stands for cu_seqlens_k; key and value are unset
  PagedCache cache;
};

// The problem without its pointers. The query comes back with the strides that the kernels need.
inline PagedProblem check_paged_attention(const char* op, PagedTensors& tensors,
                                          const PagedOptions& options) {
  tensors.query = with_unit_stride(tensors.query);
  const Tensor &query = tensors.query, &key_cache = tensors.key_cache;
  const bool packed = tensors.cu_seqlens_q.has_value();
  PUMICE_CHECK(query.dim() == (packed ? 3 : 4), op, "query must have shape [B, S_q, H, D], or ",
               "[total, H, D] with cu_seqlens_q");
  PUMICE_CHECK(is_floating_activation(query.scalar_type()), op,
               "query must be float32, float16 or bfloat16");
  PagedProblem problem{};
  PagedCache& cache = problem.cache;
  AttentionProblem& attention = problem.attention;
  cache = check_caches(op, key_cache, tensors.value_cache);
  PUMICE_CHECK(same_device(key_cache, query), op, "query and key_cache must be on one device");
  cache.type = check_cache_type(op, "query", query.scalar_type(), key_cache.scalar_type());
  attention.dtype = to_dtype(query.scalar_type());
  attention.heads = query.size(-2);
  attention.kv_heads = key_cache.size(2);
  attention.head_dim = query.size(-1);
  attention.value_dim = tensors.value_cache.size(3);
  PUMICE_CHECK(attention.heads >= 1 && attention.heads % attention.kv_heads == 0, op,
               "heads of query must be a multiple of those of the caches");
  PUMICE_CHECK(key_cache.size(3) == attention.head_dim, op,
               "query and key_cache must have one head dim");
  cache.key_scale_stride =
      check_cache_scale(op, "k_scale", tensors.k_scale, cache.type, attention.kv_heads, query);
  cache.value_scale_stride =
      check_cache_scale(op, "v_scale", tensors.v_scale, cache.type, attention.kv_heads, query);
  const Tensor &table = tensors.block_table, &seq_lens = tensors.seq_lens;
  check_int32(op, "block_table", table, query);
  check_int32(op, "seq_lens", seq_lens, query);
  PUMICE_CHECK(seq_lens.dim() == 1, op, "seq_lens must have shape [B]");
  attention.batch = seq_lens.size(0);
  PUMICE_CHECK(table.dim() == 2 && table.size(0) == attention.batch, op,
               "block_table must have shape [B, max_blocks]");
  cache.max_blocks = table.size(1);
  if (packed) {
    check_int32(op, "cu_seqlens_q", *tensors.cu_seqlens_q, query);
    PUMICE_CHECK(
        tensors.cu_seqlens_q->dim() == 1 && tensors.cu_seqlens_q->size(0) == attention.batch + 1,
        op, "cu_seqlens_q must have shape [B + 1]");
    attention.max_q = options.max_seqlen_q;
    attention.total_q = query.size(0);
  } else {
    PUMICE_CHECK(query.size(0) == attention.batch, op, "query and seq_lens must have one batch");
    attention.max_q = query.size(1);
    attention.total_q = attention.batch * attention.max_q;
  }
  PUMICE_CHECK(attention.max_q >= 0 && attention.max_q <= kMaxSequence, op,
               "sequences must be shorter than 2^29");
  // The longest that the table can hold.
  attention.max_k = cache.max_blocks > kMaxSequence / cache.block_size
                        ? kMaxSequence
                        : cache.max_blocks * cache.block_size;
  attention.query = token_view(query);
  AttentionTensors of_mask;
  of_mask.query = query;
  attention.mask = check_attention_mask(
      op, of_mask,
      {options.max_seqlen_q, attention.max_k, options.softmax_scale, options.causal,
       options.window_left, options.window_right, options.sink_tokens, 0, options.softcap},
      attention);
  if (tensors.tree_mask) {
    const Tensor& tree = *tensors.tree_mask;
    check_int32(op, "tree_mask", tree, query);
    PUMICE_CHECK(tree.dim() == 2 && tree.size(0) == attention.total_q &&
                     tree.size(1) >= (attention.max_q + 31) / 32 && tree.size(1) < kMaxSequence,
                 op, "tree_mask must have shape [queries, ceil(max_seqlen_q / 32)]");
    attention.mask.bits_of_queries = true;
    attention.mask.bits_row_words = static_cast<int32_t>(tree.size(1));
  }
  check_score(op, tensors.sinks, tensors.alibi_slopes, options.softmax_scale, options.softcap,
              query, attention);
  return problem;
}

// key [T, H_kv, D] and value [T, H_kv, D_v], and where each of their tokens goes.
struct AppendTensors {
  Tensor key, value, key_cache, value_cache, slot_mapping;
  std::optional<Tensor> k_scale, v_scale, cos, sin, positions;
};

// What cache_append is asked, without its pointers.
struct AppendProblem {
  DType dtype;  // of key and value
  int64_t tokens, kv_heads, head_dim, value_dim;
  TokenView key, value;
  PagedCache cache;
  int64_t rotary_pairs, max_position;  // 0 pairs: no rotation
};

inline void check_int64_vector(const char* op, const char* name, const Tensor& vector, int64_t size,
                               const Tensor& like) {
  PUMICE_CHECK(vector.scalar_type() == ScalarType::Long && vector.dim() == 1 &&
                   vector.size(0) == size && vector.is_contiguous() && same_device(vector, like),
               op, name, " must be int64 of shape [", size, "], contiguous, on the cache's device");
}

inline AppendProblem check_append(const char* op, AppendTensors& tensors) {
  tensors.key = with_unit_stride(tensors.key);
  tensors.value = with_unit_stride(tensors.value);
  const Tensor &key = tensors.key, &value = tensors.value, &key_cache = tensors.key_cache;
  PUMICE_CHECK(key.dim() == 3 && value.dim() == 3 && key.size(0) == value.size(0), op,
               "key and value must have shape [T, H_kv, D] and [T, H_kv, D_v]");
  PUMICE_CHECK(is_floating_activation(key.scalar_type()) &&
                   value.scalar_type() == key.scalar_type() && same_device(value, key),
               op, "key and value must be float32, float16 or bfloat16, both the same");
  AppendProblem problem{};
  problem.cache = check_caches(op, key_cache, tensors.value_cache);
  PUMICE_CHECK(same_device(key, key_cache), op, "key and key_cache must be on one device");
  problem.cache.type = check_cache_type(op, "key", key.scalar_type(), key_cache.scalar_type());
  problem.dtype = to_dtype(key.scalar_type());
  problem.tokens = key.size(0);
  problem.kv_heads = key_cache.size(2);
  problem.head_dim = key_cache.size(3);
  problem.value_dim = tensors.value_cache.size(3);
  PUMICE_CHECK(key.size(1) == problem.kv_heads && value.size(1) == problem.kv_heads &&
                   key.size(2) == problem.head_dim && value.size(2) == problem.value_dim,
               op, "key and value must have the heads and head dims of their caches");
  problem.key = token_view(key);
  problem.value = token_view(value);
  problem.cache.key_scale_stride =
      check_cache_scale(op, "k_scale", tensors.k_scale, problem.cache.type, problem.kv_heads, key);
  problem.cache.value_scale_stride =
      check_cache_scale(op, "v_scale", tensors.v_scale, problem.cache.type, problem.kv_heads, key);
  check_int64_vector(op, "slot_mapping", tensors.slot_mapping, problem.tokens, key);
  PUMICE_CHECK(tensors.cos.has_value() == tensors.sin.has_value() &&
                   tensors.cos.has_value() == tensors.positions.has_value(),
               op, "cos, sin and positions belong together");
  if (tensors.cos) {
    const Tensor &cos = *tensors.cos, &sin = *tensors.sin;
    check_float32(op, "cos", cos);
    check_float32(op, "sin", sin);
    PUMICE_CHECK(cos.dim() == 2 && sin.dim() == 2 && cos.size(0) == sin.size(0) &&
                     cos.size(1) == sin.size(1) && cos.size(1) >= 1 &&
                     2 * cos.size(1) <= problem.head_dim && cos.is_contiguous() &&
                     sin.is_contiguous() && same_device(cos, key) && same_device(sin, key),
                 op, "cos and sin must have shape [max_position, D_rot / 2] with D_rot ≤ D, ",
                 "contiguous, on the device of key");
    check_int64_vector(op, "positions", *tensors.positions, problem.tokens, key);
    problem.rotary_pairs = cos.size(1);
    problem.max_position = cos.size(0);
  }
  return problem;
}

inline void check_copy_blocks(const char* op, const Tensor& key_cache, const Tensor& value_cache,
                              const Tensor& pairs) {
  check_caches(op, key_cache, value_cache);
  PUMICE_CHECK(pairs.scalar_type() == ScalarType::Long && pairs.dim() == 2 && pairs.size(1) == 2 &&
                   pairs.is_contiguous() && same_device(pairs, key_cache),
               op, "pairs must be int64 of shape [n, 2], contiguous, on the device of the caches");
}

}  // namespace pumice
