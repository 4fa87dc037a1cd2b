// The attention operators on CUDA, but for the gradients: arguments, workspace, and which kernels.
// Nothing here waits for the device, so every operator can be captured in a CUDA graph.
#include "common/attention_args.h"
#include "cuda/attention/device_problem.h"
#include "cuda/attention/flash_run.h"

namespace pumice::cuda {
namespace {

using torch::stable::new_empty;

std::tuple<Tensor, Tensor> flash_attention(
    Tensor query, Tensor key, Tensor value, std::optional<Tensor> cu_seqlens_q,
    std::optional<Tensor> cu_seqlens_k, std::optional<Tensor> sinks,
    std::optional<Tensor> alibi_slopes, std::optional<Tensor> global_index,
    std::optional<Tensor> mask_bits, std::optional<Tensor> mask_blocks, int64_t max_seqlen_q,
    int64_t max_seqlen_k, double softmax_scale, bool causal, int64_t window_left,
    int64_t window_right, int64_t sink_tokens, int64_t global_tokens, double softcap) {
  const char* op = "pumice::flash_attention";
  AttentionTensors tensors = {query, key,          value,        cu_seqlens_q, cu_seqlens_k,
                              sinks, alibi_slopes, global_index, mask_bits,    mask_blocks};
  const AttentionOptions options = {max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_left,
                                    window_right, sink_tokens,  global_tokens, softcap};
  FlashForward call{};
  call.problem = check_attention(op, tensors, options);
  AttentionProblem& problem = call.problem;
  check_cuda_attention(op, problem);

  const DeviceGuard guard(tensors.query);
  auto [out, lse] = new_attention_results(tensors.query, problem, cu_seqlens_q.has_value());
  if (attention_is_empty(problem, out, lse)) return {out, lse};
  set_device_pointers(problem, tensors);
  Workspace workspace;
  std::vector<AlignedOperand> operands;
  if (problem.dtype != DType::kFloat32) {
    operands.emplace_back(tensors.query, problem.query, workspace);
    operands.emplace_back(tensors.key, problem.key, workspace);
    operands.emplace_back(tensors.value, problem.value, workspace);
    call.key_columns = static_cast<int32_t>(operands[1].columns());
    call.value_columns = static_cast<int32_t>(operands[2].columns());
  }
  run_flash(op, call, tensors.query, operands, workspace, out, lse, flash_forward);
  return {out, lse};
}

std::tuple<Tensor, Tensor> pack_mask(Tensor mask) {
  const char* op = "pumice::attention_mask_pack";
  PUMICE_CHECK(mask.scalar_type() == ScalarType::Bool && mask.dim() == 4, op,
               "mask must be bool, of shape [B or 1, H or 1, S_q, S_k]");
  const int64_t q_len = mask.size(2), k_len = mask.size(3);
  PUMICE_CHECK(q_len <= kMaxSequence && k_len <= kMaxSequence, op,
               "sequences must be shorter than 2^29");
  const DeviceGuard guard(mask);
  Tensor bits =
      new_empty(mask, {mask.size(0), mask.size(1), q_len, (k_len + 31) / 32}, ScalarType::Int);
  Tensor blocks = new_empty(mask,
                            {mask.size(0), mask.size(1), (q_len + kMaskBlock - 1) / kMaskBlock,
                             (k_len + kMaskBlock - 1) / kMaskBlock},
                            ScalarType::Byte);
  if (mask.numel() == 0) return {bits, blocks};
  MaskPack pack{};
  pack.mask = static_cast<const uint8_t*>(read_pointer<void>(mask));
  for (int i = 0; i < 4; ++i) pack.strides[i] = mask.stride(i);
  pack.batch = mask.size(0);
  pack.heads = mask.size(1);
  pack.q_len = q_len;
  pack.k_len = k_len;
  pack.bits = static_cast<uint32_t*>(write_pointer<void>(bits));
  pack.blocks = write_pointer<uint8_t>(blocks);
  attention_mask_pack(pack, current_stream(mask));
  return {bits, blocks};
}

std::tuple<Tensor, Tensor> merge(Tensor outs, Tensor lses) {
  const char* op = "pumice::merge_attention";
  PUMICE_CHECK(outs.dim() == 5 && is_floating_activation(outs.scalar_type()), op,
               "outs must be float32, float16 or bfloat16, of shape [P, B, S, H, D]");
  check_float32(op, "lses", lses);
  PUMICE_CHECK(lses.dim() == 4 && lses.size(0) == outs.size(0) && lses.size(1) == outs.size(1) &&
                   lses.size(2) == outs.size(3) && lses.size(3) == outs.size(2) &&
                   same_device(lses, outs),
               op, "lses must have shape [P, B, H, S], on the device of outs");
  PUMICE_CHECK(outs.size(0) >= 1 && outs.size(0) <= INT32_MAX && outs.size(4) <= INT32_MAX, op,
               "outs must hold at least one part");
  const DeviceGuard guard(outs);
  const Tensor results = torch::stable::contiguous(outs), logs = torch::stable::contiguous(lses);
  MergeAttention merge{};
  merge.parts = outs.size(0);
  merge.batch = outs.size(1);
  merge.tokens = outs.size(2);
  merge.heads = outs.size(3);
  merge.dim = outs.size(4);
  merge.dtype = to_dtype(outs.scalar_type());
  Tensor out =
      new_empty(outs, {merge.batch, merge.tokens, merge.heads, merge.dim}, outs.scalar_type());
  Tensor lse = new_empty(lses, {merge.batch, merge.heads, merge.tokens}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  merge.outs = read_pointer<void>(results);
  merge.lses = read_pointer<float>(logs);
  merge.out = write_pointer<void>(out);
  merge.lse = write_pointer<float>(lse);
  merge_attention(merge, current_stream(outs));
  return {out, lse};
}

}  // namespace

PUMICE_CUDA_IMPL(m) {
  m.impl("flash_attention", TORCH_BOX(&flash_attention));
  m.impl("attention_mask_pack", TORCH_BOX(&pack_mask));
  m.impl("merge_attention", TORCH_BOX(&merge));
}

}  // namespace pumice::cuda
