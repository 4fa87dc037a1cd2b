// From a problem with pointers to out and lse: plans, partial results, launches. Host code.
#pragma once

#include <limits>
#include <tuple>
#include <vector>

#include "common/attention_args.h"
#include "cuda/attention/aligned_operand.h"
#include "cuda/attention/flash_forward.h"

namespace pumice::cuda {

// out and lse of a problem, not yet written.
inline std::tuple<Tensor, Tensor> new_attention_results(const Tensor& query,
                                                        const AttentionProblem& problem,
                                                        bool packed) {
  using torch::stable::new_empty;
  Tensor out = new_empty(query, shape_with_last(query, problem.value_dim), query.scalar_type());
  Tensor lse =
      packed ? new_empty(query, {problem.heads, problem.total_q}, ScalarType::Float)
             : new_empty(query, {problem.batch, problem.heads, problem.max_q}, ScalarType::Float);
  return {out, lse};
}

// Where there is nothing to launch: true, and rows of no sequence have what they should.
inline bool attention_is_empty(const AttentionProblem& problem, Tensor& out, Tensor& lse) {
  if (problem.batch != 0 && problem.max_q != 0 && problem.total_q != 0) return false;
  torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  torch::stable::zero_(out);
  return true;
}

// `operands` have reserved in `workspace` what their copies need; launch_plan(call, blocks, stream)
// starts the kernel of call.plan.
template <class Call, class Launch>
void run_flash(const char* op, Call& call, const Tensor& query,
               std::vector<AlignedOperand>& operands, Workspace& workspace, Tensor& out,
               Tensor& lse, Launch&& launch_plan) {
  const AttentionProblem& problem = call.problem;
  const cudaStream_t stream = current_stream(query);
  const int sm_count = device_properties(query).sm_count;
  const FlashPlans plans = plan_flash_calls(problem, sm_count);
  // One piece for the plans' partial results: they run one after the other.
  int64_t partial_rows = 0;
  for (int i = 0; i < plans.count; ++i) {
    partial_rows = std::max(partial_rows, flash_partial_rows(plans.plan[i], problem.batch));
  }
  const size_t partial_out =
      workspace.reserve(partial_rows * flash_partial_columns(problem.value_dim) * 4);
  const size_t partial_lse = workspace.reserve(partial_rows * 4);
  workspace.allocate(query);
  for (AlignedOperand& operand : operands) operand.finish(workspace, sm_count, stream);

  call.out = write_pointer<void>(out);
  call.lse = write_pointer<float>(lse);
  if (partial_rows > 0) {
    call.partial_out = workspace.at<float>(partial_out);
    call.partial_lse = workspace.at<float>(partial_lse);
  }
  for (int i = 0; i < plans.count; ++i) {
    call.plan = plans.plan[i];
    const int64_t blocks = flash_blocks(call.plan, problem.batch);
    PUMICE_CHECK(blocks <= INT32_MAX, op, "a batch of ", problem.batch, " sequences, ",
                 problem.heads, " heads and ", problem.max_q, " queries is too large for a launch");
    launch_plan(call, blocks, stream);
    flash_merge(call, stream);
  }
}

}  // namespace pumice::cuda
