// flash_attention, merge_attention and attention_mask_pack on the CPU: arguments, workspace and
// threads; the arithmetic is in attention_*.cpp.
#include <algorithm>
#include <atomic>
#include <limits>

#include "cpu/attention_operands.h"
#include "cpu/attention_plan.h"
#include "cpu/dispatch.h"
#include "cpu/workspace.h"

namespace pumice::cpu {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

// f(worker, task) for every task, each worker taking the next one when it is done: tasks differ
// in length too much to be dealt out beforehand.
template <typename F>
void for_tasks(int64_t tasks, int64_t workers, const F& f) {
  std::atomic<int64_t> next = 0;
  parallel_for(0, workers, 1, [&](int64_t worker, int64_t /*end*/) {
    for (int64_t task = next++; task < tasks; task = next++) f(worker, task);
  });
}

// A tensor of out's size for rows that no sequence holds would be left unwritten.
void fill_uncovered(const AttentionProblem& problem, Tensor& out, Tensor& lse) {
  if (!problem.packed()) return;
  if (problem.cu_seqlens_q[0] == 0 && problem.cu_seqlens_q[problem.batch] == problem.total_q) {
    return;
  }
  torch::stable::zero_(out);
  torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
}

struct Result {
  void* out;
  float* lse;
  int64_t lse_head_stride;
};

Result result_of(const AttentionProblem& problem, const SequencePlan& sequence, Tensor& out,
                 Tensor& lse) {
  const int64_t token = problem.packed() ? sequence.first_query : sequence.batch * problem.max_q;
  const int64_t row =
      problem.packed() ? sequence.first_query : sequence.batch * problem.heads * problem.max_q;
  const int64_t element = token * problem.heads * problem.value_dim;
  return {static_cast<char*>(out.mutable_data_ptr()) + element * size_of(problem.dtype),
          lse.mutable_data_ptr<float>() + row, problem.packed() ? problem.total_q : problem.max_q};
}

void forward(const AttentionProblem& problem, Tensor& out, Tensor& lse) {
  const AttentionPlan plan(problem);
  if (plan.tasks() == 0) return;
  const AttentionForwardKernels& kernels = attention_forward_kernels();
  const int64_t workers = std::min<int64_t>(plan.tasks(), torch::stable::get_num_threads());
  const int64_t scratch_size = ceil_div(kernels.scratch_size(problem), 16) * 16;
  Workspace workspace;
  const size_t scratch = workspace.reserve<float>(workers * scratch_size);
  const size_t partial_outs = workspace.reserve<float>(plan.partial_rows() * problem.value_dim);
  const size_t partial_lses = workspace.reserve<float>(plan.partial_rows());
  workspace.allocate(out);

  const auto partial_out = [&](const SequencePlan& sequence, int64_t part) {
    const int64_t row = sequence.partial + part * sequence.q_len * problem.heads;
    return workspace.at<float>(partial_outs) + row * problem.value_dim;
  };
  const auto partial_lse = [&](const SequencePlan& sequence, int64_t part) {
    return workspace.at<float>(partial_lses) + sequence.partial +
           part * sequence.q_len * problem.heads;
  };
  for_tasks(plan.tasks(), workers, [&](int64_t worker, int64_t index) {
    const SequencePlan& sequence = plan.sequence_of(index);
    AttentionTask task{};
    const int64_t part = plan.describe(sequence, index, task);
    if (sequence.parts > 1) {
      task.out = partial_out(sequence, part);
      task.out_dtype = DType::kFloat32;
      task.lse = partial_lse(sequence, part);
      task.lse_head_stride = sequence.q_len;
    } else {
      const Result result = result_of(problem, sequence, out, lse);
      task.out = result.out;
      task.out_dtype = problem.dtype;
      task.lse = result.lse;
      task.lse_head_stride = result.lse_head_stride;
      task.sinks = problem.score.sinks;
    }
    kernels.run(problem, task, workspace.at<float>(scratch) + worker * scratch_size);
  });
  for (const SequencePlan& sequence : plan.sequences()) {
    if (sequence.parts == 1) continue;
    const Result result = result_of(problem, sequence, out, lse);
    const int64_t rows = sequence.q_len * problem.heads;
    const AttentionMerge merge{sequence.parts,
                               problem.heads,
                               problem.value_dim,
                               partial_out(sequence, 0),
                               DType::kFloat32,
                               rows * problem.value_dim,
                               partial_lse(sequence, 0),
                               rows,
                               sequence.q_len,
                               problem.score.sinks,
                               result.out,
                               problem.dtype,
                               result.lse,
                               result.lse_head_stride};
    for_rows(rows, problem.value_dim * sequence.parts, [&](int64_t begin, int64_t end) {
      attention_merge_kernels().merge(merge, begin, end);
    });
  }
}

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
  fill_uncovered(problem, out, lse);
  forward(problem, out, lse);
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
