// flash_attention, merge_attention and attention_mask_pack on the CPU: their arguments; the
// arithmetic is in attention_*.cpp.
#include <algorithm>

#include "cpu/attention_operands.h"
#include "cpu/attention_run.h"
#include "cpu/dispatch.h"
#include "cpu/workspace.h"

namespace pumice::cpu {
namespace {

using torch::stable::new_empty;

std::tuple<Tensor, Tensor> flash_attention(
    Tensor query, Tensor key, Tensor value, std::optional<Tensor> cu_seqlens_q,
    std::optional<Tensor> cu_seqlens_k, std::optional<Tensor> sinks,
    std::optional<Tensor> alibi_slopes, std::optional<Tensor> global_index,
    std::optional<Tensor> mask_bits, std::optional<Tensor> mask_blocks, int64_t max_seqlen_q,
    int64_t max_seqlen_k, double softmax_scale, bool causal, int64_t window_left,
    int64_t window_right, int64_t sink_tokens, int64_t global_tokens, double softcap) {
  AttentionTensors tensors{query, key,          value,        cu_seqlens_q, cu_seqlens_k,
                           sinks, alibi_slopes, global_index, mask_bits,    mask_blocks};
  const AttentionOptions options{max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_left,
                                 window_right, sink_tokens,  global_tokens, softcap};
  const AttentionProblem problem = attention_problem("pumice::flash_attention", tensors, options);
  Tensor out = new_empty(query, shape_with_last(query, problem.value_dim), query.scalar_type());
  Tensor lse =
      problem.packed()
          ? new_empty(query, {problem.heads, problem.total_q}, ScalarType::Float)
          : new_empty(query, {problem.batch, problem.heads, problem.max_q}, ScalarType::Float);
  attention_forward(problem, nullptr, out, lse);
  return {out, lse};
}

std::tuple<Tensor, Tensor> merge_attention(Tensor outs, Tensor lses) {
  const char* op = "pumice::merge_attention";
  PUMICE_CHECK(outs.dim() == 5, op, "outs must have shape [P, B, S, H, D]");
  PUMICE_CHECK(is_floating_activation(outs.scalar_type()), op,
               "outs must be float32, float16 or bfloat16");
  check_float32(op, "lses", lses);
  const int64_t parts = outs.size(0), batch = outs.size(1), queries = outs.size(2),
                heads = outs.size(3), dim = outs.size(4);
  PUMICE_CHECK(lses.dim() == 4 && lses.size(0) == parts && lses.size(1) == batch &&
                   lses.size(2) == heads && lses.size(3) == queries && same_device(lses, outs),
               op, "lses must have shape [P, B, H, S], on the device of outs");
  const Tensor parts_out = torch::stable::contiguous(outs);
  const Tensor parts_lse = torch::stable::contiguous(lses);
  Tensor out = new_empty(outs, {batch, queries, heads, dim}, outs.scalar_type());
  Tensor lse = new_empty(outs, {batch, heads, queries}, ScalarType::Float);
  const int64_t rows = queries * heads;
  if (batch * rows == 0) return {out, lse};
  const DType dtype = to_dtype(outs.scalar_type());
  for_rows(batch * rows, std::max<int64_t>(1, parts * dim), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin / rows; b * rows < end; ++b) {
      const int64_t at = b * rows * dim * size_of(dtype);
      const AttentionMerge merge{parts,
                                 heads,
                                 dim,
                                 static_cast<const char*>(parts_out.const_data_ptr()) + at,
                                 dtype,
                                 batch * rows * dim,
                                 parts_lse.const_data_ptr<float>() + b * rows,
                                 batch * rows,
                                 queries,
                                 nullptr,
                                 static_cast<char*>(out.mutable_data_ptr()) + at,
                                 dtype,
                                 lse.mutable_data_ptr<float>() + b * rows,
                                 queries};
      attention_merge_kernels().merge(merge, std::max<int64_t>(0, begin - b * rows),
                                      std::min(rows, end - b * rows));
    }
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor> attention_mask_pack(Tensor mask) {
  const char* op = "pumice::attention_mask_pack";
  PUMICE_CHECK(mask.dim() == 4 && mask.scalar_type() == ScalarType::Bool, op,
               "mask must be bool of shape [B or 1, H or 1, S_q, S_k]");
  const Tensor dense = torch::stable::contiguous(mask);
  const int64_t q_len = mask.size(2), k_len = mask.size(3), matrices = mask.size(0) * mask.size(1);
  PUMICE_CHECK(q_len <= kMaxSequence && k_len <= kMaxSequence, op,
               "sequences must be shorter than 2^29");
  const int64_t bands = ceil_div(q_len, kMaskBlock);
  Tensor bits =
      new_empty(mask, {mask.size(0), mask.size(1), q_len, ceil_div(k_len, 32)}, ScalarType::Int);
  Tensor blocks = new_empty(mask, {mask.size(0), mask.size(1), bands, ceil_div(k_len, kMaskBlock)},
                            ScalarType::Byte);
  if (mask.numel() == 0) return {bits, blocks};
  const AttentionMaskPack job{static_cast<const uint8_t*>(dense.const_data_ptr()), q_len, k_len,
                              static_cast<uint32_t*>(bits.mutable_data_ptr()),
                              blocks.mutable_data_ptr<uint8_t>()};
  for_rows(matrices * bands, kMaskBlock * k_len, [&](int64_t begin, int64_t end) {
    attention_merge_kernels().pack_mask(job, begin, end);
  });
  return {bits, blocks};
}

}  // namespace
PUMICE_CPU_IMPL(m) {
  m.impl("flash_attention", TORCH_BOX(&flash_attention));
  m.impl("merge_attention", TORCH_BOX(&merge_attention));
  m.impl("attention_mask_pack", TORCH_BOX(&attention_mask_pack));
}

}  // namespace pumice::cpu
