// The forward pass of attention on the CPU: workspace, threads, and the merge of parts along keys;
// the arithmetic is in attention_forward.cpp and attention_merge.cpp.
#include "cpu/attention_run.h"

#include <algorithm>
#include <atomic>
#include <limits>

#include "cpu/attention_plan.h"
#include "cpu/dispatch.h"
#include "cpu/workspace.h"

namespace pumice::cpu {
namespace {

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

}  // namespace

void attention_forward(const AttentionProblem& problem, const PagedCache* cache, Tensor& out,
                       Tensor& lse) {
  fill_uncovered(problem, out, lse);
  const int64_t threads = torch::stable::get_num_threads();
  const AttentionPlan plan(problem, cache, threads);
  if (plan.tasks() == 0) return;
  const AttentionForwardKernels& kernels = attention_forward_kernels();
  const int64_t workers = std::min(plan.tasks(), threads);
  const int64_t scratch_size = ceil_div(kernels.scratch_size(problem), 16) * 16;
  Workspace workspace;
  const size_t scratch = workspace.reserve<float>(workers * scratch_size);
  const size_t partial_outs = workspace.reserve<float>(plan.partial_rows() * problem.value_dim);
  const size_t partial_lses = workspace.reserve<float>(plan.partial_rows());
  const int64_t packed_size = kernels.packed_size(problem);
  const size_t packed = workspace.reserve<float>(plan.packed_blocks() * packed_size);
  workspace.allocate(out);

  const auto packed_at = [&](int64_t block) {
    return workspace.at<float>(packed) + block * packed_size;
  };
  for_tasks(plan.packed_blocks(), workers, [&](int64_t worker, int64_t index) {
    AttentionTask task{};
    const int64_t block = plan.describe_block(plan.sequence_of_block(index), index, task);
    kernels.pack(problem, task, workspace.at<float>(scratch) + worker * scratch_size,
                 packed_at(block));
  });
  const auto partial_out = [&](const SequencePlan& sequence, int64_t part) {
    const int64_t row = sequence.partial + part * sequence.q_len * problem.heads;
    return workspace.at<float>(partial_outs) + row * problem.value_dim;
  };
  const auto partial_lse = [&](const SequencePlan& sequence, int64_t part) {
    return workspace.at<float>(partial_lses) + sequence.partial +
           part * sequence.q_len * problem.heads;
  };
  for_tasks(plan.tasks(), workers, [&](int64_t worker, int64_t index) {
    const SequencePlan& sequence = plan.sequence_of_task(index);
    AttentionTask task{};
    const int64_t part = plan.describe(sequence, index, task);
    task.cache = cache;
    if (sequence.blocks > 0) task.packed = packed_at(plan.first_block(sequence, task.head));
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

}  // namespace pumice::cpu
