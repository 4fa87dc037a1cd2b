// flash_attention_backward on CUDA: arguments, workspace, and which kernels. Nothing here waits for
// the device, so it can be captured in a CUDA graph.
#include "common/attention_args.h"
#include "cuda/attention/aligned_operand.h"
#include "cuda/attention/device_problem.h"
#include "cuda/attention/flash_backward.h"

namespace pumice::cuda {
namespace {

using torch::stable::new_empty;

constexpr const char* kOp = "pumice::flash_attention_backward";

bool same_sizes(const Tensor& tensor, const std::vector<int64_t>& sizes) {
  return std::vector<int64_t>(tensor.sizes().begin(), tensor.sizes().end()) == sizes;
}

void check_result(const char* name, const Tensor& tensor, const Tensor& query,
                  const std::vector<int64_t>& sizes) {
  PUMICE_CHECK(tensor.scalar_type() == query.scalar_type() && same_device(tensor, query), kOp, name,
               " must have the dtype and device of query");
  PUMICE_CHECK(same_sizes(tensor, sizes), kOp, name, " must have the shape of the output");
}

void check_row_values(const char* name, const Tensor& tensor, const Tensor& query,
                      const std::vector<int64_t>& sizes) {
  check_float32(kOp, name, tensor);
  PUMICE_CHECK(same_device(tensor, query), kOp, name, " must be on the device of query");
  PUMICE_CHECK(same_sizes(tensor, sizes), kOp, name, " must have shape [B, H, S_q], or [H, total]");
}

// The gradients of tokens that belong to no sequence, or of a sequence longer than max_seqlen says,
// are zero.
void fill_uncovered(const Tensor& gradient, cudaStream_t stream) {
  const size_t bytes = static_cast<size_t>(gradient.numel()) * gradient.element_size();
  if (bytes > 0) fill_zero(write_pointer<void>(gradient), bytes, stream);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> flash_attention_backward(
    Tensor grad_out, std::optional<Tensor> grad_lse, Tensor query, Tensor key, Tensor value,
    Tensor out, Tensor lse, std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k,
    std::optional<Tensor> sinks, std::optional<Tensor> alibi_slopes,
    std::optional<Tensor> global_index, std::optional<Tensor> mask_bits,
    std::optional<Tensor> mask_blocks, int64_t max_seqlen_q, int64_t max_seqlen_k,
    double softmax_scale, bool causal, int64_t window_left, int64_t window_right,
    int64_t sink_tokens, int64_t global_tokens, double softcap) {
  AttentionTensors tensors = {query, key,          value,        cu_seqlens_q, cu_seqlens_k,
                              sinks, alibi_slopes, global_index, mask_bits,    mask_blocks};
  const AttentionOptions options = {max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_left,
                                    window_right, sink_tokens,  global_tokens, softcap};
  FlashBackward call{};
  call.problem = check_attention(kOp, tensors, options);
  AttentionProblem& problem = call.problem;
  check_cuda_attention(kOp, problem);
  const bool packed = cu_seqlens_q.has_value();
  const std::vector<int64_t> out_sizes = shape_with_last(query, problem.value_dim);
  const std::vector<int64_t> lse_sizes =
      packed ? std::vector<int64_t>{problem.heads, problem.total_q}
             : std::vector<int64_t>{problem.batch, problem.heads, problem.max_q};
  check_result("out", out, query, out_sizes);
  check_result("grad_out", grad_out, query, out_sizes);
  check_row_values("lse", lse, query, lse_sizes);
  if (grad_lse) check_row_values("grad_lse", *grad_lse, query, lse_sizes);

  const DeviceGuard guard(query);
  const cudaStream_t stream = current_stream(query);
  const DeviceProperties& device = device_properties(query);
  const ScalarType dtype = query.scalar_type();
  Tensor grad_query = new_empty(query, query.sizes(), dtype);
  Tensor grad_key = new_empty(key, key.sizes(), dtype);
  Tensor grad_value = new_empty(value, value.sizes(), dtype);
  Tensor delta = new_empty(query, lse_sizes, ScalarType::Float);
  if (packed) {
    for (const Tensor& gradient : {grad_query, grad_key, grad_value}) {
      fill_uncovered(gradient, stream);
    }
  }
  if (problem.batch == 0) return {grad_query, grad_key, grad_value, delta};

  grad_out = with_unit_stride(grad_out);
  out = with_unit_stride(out);
  lse = torch::stable::contiguous(lse);
  if (grad_lse) grad_lse = torch::stable::contiguous(*grad_lse);
  set_device_pointers(problem, tensors);
  call.out = token_view(out);
  call.out.data = read_pointer<void>(out);
  call.grad_out = token_view(grad_out);
  call.grad_out.data = read_pointer<void>(grad_out);
  call.row_grad_out = call.grad_out;

  Workspace workspace;
  const size_t rows = workspace.reserve(lse.numel() * static_cast<int64_t>(sizeof(FlashGradRow)));
  std::vector<AlignedOperand> operands;
  if (problem.dtype != DType::kFloat32) {
    operands.reserve(4);
    operands.emplace_back(tensors.query, problem.query, workspace);
    operands.emplace_back(tensors.key, problem.key, workspace);
    operands.emplace_back(tensors.value, problem.value, workspace);
    operands.emplace_back(grad_out, call.grad_out, workspace);
    call.key_columns = static_cast<int32_t>(operands[1].columns());
    call.value_columns = static_cast<int32_t>(operands[2].columns());
  }
  workspace.allocate(query);
  for (AlignedOperand& operand : operands) operand.finish(workspace, device.sm_count, stream);

  call.lse = read_pointer<float>(lse);
  call.grad_lse = grad_lse ? read_pointer<float>(*grad_lse) : nullptr;
  call.delta = write_pointer<float>(delta);
  call.rows = lse.numel() > 0 ? workspace.at<FlashGradRow>(rows) : nullptr;
  call.grad_query = write_pointer<void>(grad_query);
  call.grad_key = write_pointer<void>(grad_key);
  call.grad_value = write_pointer<void>(grad_value);
  flash_backward_rows(call, stream);
  switch (problem.dtype) {
    case DType::kFloat32:
      flash_backward_fp32(call, stream);
      break;
    case DType::kFloat16:
      flash_backward_fp16(call, device.shared_memory_limit, stream);
      break;
    case DType::kBFloat16:
      flash_backward_bf16(call, device.shared_memory_limit, stream);
      break;
  }
  return {grad_query, grad_key, grad_value, delta};
}

}  // namespace

PUMICE_CUDA_IMPL(m) { m.impl("flash_attention_backward", TORCH_BOX(&flash_attention_backward)); }

}  // namespace pumice::cuda
