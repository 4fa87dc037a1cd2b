// The operators of the paged cache on CUDA: arguments, and which kernels. Nothing here waits for
// the device or looks at what slots, pairs and tables hold, so every operator can be captured in a
// CUDA graph.
#include "common/paged_args.h"
#include "cuda/attention/device_problem.h"
#include "cuda/attention/flash_run.h"
#include "cuda/attention/paged_forward.h"
#include "cuda/attention/paged_writes.h"
#include "cuda/tensor_access.h"

namespace pumice::cuda {
namespace {

template <class T>
const T* pointer_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? read_pointer<T>(*tensor) : nullptr;
}

// cp.async reads 16 bytes of a row at a time, and a pool is not copied to make that possible.
void check_rows_of_cache(const char* op, const char* name, const Tensor& cache) {
  const auto piece = 16 / static_cast<int64_t>(cache.element_size());
  bool aligned = reinterpret_cast<uintptr_t>(cache.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i < 3; ++i) aligned &= cache.size(i) == 1 || cache.stride(i) % piece == 0;
  PUMICE_CHECK(aligned && cache.size(3) % piece == 0, op, "rows of ", name,
               " must lie on boundaries of 16 bytes on CUDA with queries of 16 bits, and its head "
               "dim be a multiple of ",
               piece, " (head dim ", cache.size(3), ", strides ", cache.stride(0), ", ",
               cache.stride(1), ", ", cache.stride(2), ")");
}

void set_device_pointers(PagedForward& call, const PagedTensors& tensors) {
  AttentionProblem& problem = call.problem;
  problem.query.data = read_pointer<void>(tensors.query);
  problem.cu_seqlens_q = pointer_or_null<int32_t>(tensors.cu_seqlens_q);
  problem.seq_lens = read_pointer<int32_t>(tensors.seq_lens);
  problem.mask.bits =
      reinterpret_cast<const uint32_t*>(pointer_or_null<int32_t>(tensors.tree_mask));
  problem.score.alibi_slopes = pointer_or_null<float>(tensors.alibi_slopes);
  problem.score.sinks = pointer_or_null<float>(tensors.sinks);
  call.cache.key.data = read_pointer<void>(tensors.key_cache);
  call.cache.value.data = read_pointer<void>(tensors.value_cache);
  call.cache.block_table = read_pointer<int32_t>(tensors.block_table);
  call.cache.key_scale = pointer_or_null<float>(tensors.k_scale);
  call.cache.value_scale = pointer_or_null<float>(tensors.v_scale);
}

std::tuple<Tensor, Tensor> attention(Tensor query, Tensor key_cache, Tensor value_cache,
                                     Tensor block_table, Tensor seq_lens,
                                     std::optional<Tensor> cu_seqlens_q,
                                     std::optional<Tensor> sinks,
                                     std::optional<Tensor> alibi_slopes,
                                     std::optional<Tensor> tree_mask, std::optional<Tensor> k_scale,
                                     std::optional<Tensor> v_scale, int64_t max_seqlen_q,
                                     double softmax_scale, bool causal, int64_t window_left,
                                     int64_t window_right, int64_t sink_tokens, double softcap) {
  const char* op = "pumice::paged_attention";
  PagedTensors tensors{query, key_cache,    value_cache, block_table, seq_lens, cu_seqlens_q,
                       sinks, alibi_slopes, tree_mask,   k_scale,     v_scale};
  const PagedProblem checked = check_paged_attention(
      op, tensors,
      {max_seqlen_q, softmax_scale, causal, window_left, window_right, sink_tokens, softcap});
  PagedForward call{};
  call.problem = checked.attention;
  call.cache = checked.cache;
  call.block_of = BlockDivision::by(call.cache.block_size);
  AttentionProblem& problem = call.problem;
  check_cuda_attention(op, problem);
  const bool is_16bit = problem.dtype != DType::kFloat32;
  if (is_16bit) {
    check_rows_of_cache(op, "key_cache", key_cache);
    check_rows_of_cache(op, "value_cache", value_cache);
  }

  const DeviceGuard guard(tensors.query);
  auto [out, lse] = new_attention_results(tensors.query, problem, cu_seqlens_q.has_value());
  if (attention_is_empty(problem, out, lse)) return {out, lse};
  set_device_pointers(call, tensors);
  Workspace workspace;
  std::vector<AlignedOperand> operands;
  if (is_16bit) {
    operands.emplace_back(tensors.query, problem.query, workspace);
    call.key_columns = static_cast<int32_t>(problem.head_dim);
    call.value_columns = static_cast<int32_t>(problem.value_dim);
  }
  run_flash(op, call, tensors.query, operands, workspace, out, lse, paged_forward);
  return {out, lse};
}

void append(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor slot_mapping,
            std::optional<Tensor> k_scale, std::optional<Tensor> v_scale, std::optional<Tensor> cos,
            std::optional<Tensor> sin, std::optional<Tensor> positions, bool interleaved) {
  const char* op = "pumice::cache_append";
  AppendTensors tensors{key,     value,   key_cache, value_cache, slot_mapping,
                        k_scale, v_scale, cos,       sin,         positions};
  const AppendProblem problem = check_append(op, tensors);
  PUMICE_CHECK(problem.tokens <= INT32_MAX, op, problem.tokens, " tokens are too many");
  PUMICE_CHECK(problem.kv_heads * (problem.head_dim + problem.value_dim) <= INT32_MAX, op,
               "a token of ", problem.kv_heads, " heads is too large");
  const DeviceGuard guard(key_cache);
  if (problem.tokens == 0 || problem.cache.num_blocks == 0) return;
  CacheAppend job{};
  job.dtype = problem.dtype;
  job.tokens = problem.tokens;
  job.kv_heads = static_cast<int32_t>(problem.kv_heads);
  job.head_dim = static_cast<int32_t>(problem.head_dim);
  job.value_dim = static_cast<int32_t>(problem.value_dim);
  job.key = problem.key;
  job.key.data = read_pointer<void>(tensors.key);
  job.value = problem.value;
  job.value.data = read_pointer<void>(tensors.value);
  job.cache = problem.cache;
  job.cache.key_scale = pointer_or_null<float>(k_scale);
  job.cache.value_scale = pointer_or_null<float>(v_scale);
  job.key_cache = write_pointer<void>(key_cache);
  job.value_cache = write_pointer<void>(value_cache);
  job.slots = read_pointer<int64_t>(slot_mapping);
  job.rotary_pairs = static_cast<int32_t>(problem.rotary_pairs);
  job.interleaved = interleaved;
  job.cos = pointer_or_null<float>(cos);
  job.sin = pointer_or_null<float>(sin);
  job.positions = pointer_or_null<int64_t>(positions);
  job.max_position = problem.max_position;
  cache_append(job, current_stream(key_cache));
}

void copy_blocks(Tensor key_cache, Tensor value_cache, Tensor pairs) {
  check_copy_blocks("pumice::cache_copy_blocks", key_cache, value_cache, pairs);
  const DeviceGuard guard(key_cache);
  if (pairs.size(0) == 0) return;
  for (const Tensor& cache : {key_cache, value_cache}) {
    if (cache.size(0) == 0) continue;
    const auto size = static_cast<int64_t>(cache.element_size());
    CacheCopy copy{};
    copy.data = write_pointer<void>(cache);
    copy.block_stride = cache.stride(0) * size;
    copy.slot_stride = cache.stride(1) * size;
    copy.head_stride = cache.stride(2) * size;
    copy.blocks = cache.size(0);
    copy.slots = static_cast<int32_t>(cache.size(1));
    copy.heads = static_cast<int32_t>(cache.size(2));
    copy.row_bytes = cache.size(3) * size;
    copy.pairs = read_pointer<int64_t>(pairs);
    copy.count = pairs.size(0);
    cache_copy_blocks(copy, device_properties(cache).sm_count, current_stream(cache));
  }
}

}  // namespace

PUMICE_CUDA_IMPL(m) {
  m.impl("paged_attention", TORCH_BOX(&attention));
  m.impl("cache_append", TORCH_BOX(&append));
  m.impl("cache_copy_blocks", TORCH_BOX(&copy_blocks));
}

}  // namespace pumice::cuda
