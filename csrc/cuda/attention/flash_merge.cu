// kernel: flash_merge
//
// The second launch of flash_forward where keys are cut into parts: a warp for each query and head
// reads its parts' results (fp32) and lse, and writes out and lse.
//
// Floor for one query, 32 heads, D = 128 and 16 parts: 0.26 MB, a fraction of a microsecond; what
// it takes is a launch (some 2 µs, without programmatic dependent launch).
#include "cuda/attention/flash_forward.h"
#include "cuda/attention/merge_row.h"
#include "cuda/launch.h"

namespace pumice::cuda {
namespace {

constexpr int kMergeWarps = 4;

template <class T>
__global__ void flash_merge_kernel(const __grid_constant__ FlashForward call,
                                   int blocks_of_sequence) {
  const FlashPlan& plan = call.plan;
  const AttentionProblem& problem = call.problem;
  const auto block = static_cast<int>(blockIdx.x);
  const FlashSequence sequence = flash_sequence(problem, block / blocks_of_sequence);
  const int rows = sequence.q_len * plan.pack;  // of one of grid_heads
  const int index = block % blocks_of_sequence * kMergeWarps + warp_index();
  const int parts = flash_parts(plan, problem.mask, sequence.q_len, sequence.k_len);
  if (!plan.serves(sequence.q_len) || parts == 1 || index >= rows * plan.grid_heads) return;

  const int head_of_grid = index / rows, row = index % rows;
  const int i = row / plan.pack, head = head_of_grid * plan.pack + row % plan.pack;
  const auto partial_row = [&](int part) {
    return flash_partial_row(plan, sequence.batch, head_of_grid, plan.tiles(sequence.q_len),
                             row / plan.tile_rows, parts, part, row % plan.tile_rows);
  };
  const auto columns = static_cast<int>(problem.value_dim);
  const int64_t stride = flash_partial_columns(columns);
  T* out = static_cast<T*>(call.out) + result_offset(problem, sequence, i, head, columns);
  const float sink = problem.score.sinks == nullptr ? -INFINITY : problem.score.sinks[head];
  const float lse = merge_row(
      parts, columns, sink, [&](int p) { return call.partial_lse[partial_row(p)]; },
      [&](int p, int column) { return call.partial_out[partial_row(p) * stride + column]; },
      [&](int column, float value) { out[column] = from_float<T>(value); });
  if (lane_index() == 0) call.lse[lse_offset(problem, sequence, i, head)] = lse;
}

}  // namespace

void flash_merge(const FlashForward& call, cudaStream_t stream) {
  const FlashPlan& plan = call.plan;
  if (plan.slab_items == 0) return;
  const int64_t blocks = (flash_merged_rows(plan, call.problem) + kMergeWarps - 1) / kMergeWarps;
  dispatch_element(call.problem.dtype, [&](auto element) {
    launch(flash_merge_kernel<decltype(element)>,
           dim3(static_cast<unsigned>(blocks * call.problem.batch)), dim3(kMergeWarps * kWarpSize),
           0, stream, call, static_cast<int>(blocks));
  });
}

}  // namespace pumice::cuda
