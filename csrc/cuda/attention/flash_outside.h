// Packed tokens that belong to no sequence: out 0 and lse -∞, whatever the tokens hold.
#pragma once

#include "cuda/attention/flash_schedule.h"
#include "cuda/element.h"

namespace pumice::cuda {

// The first block of each sequence and head looks after the tokens between this sequence and the
// next, and the first sequence's after those before it, too. As a rule there are none.
template <class T>
__device__ __forceinline__ void store_outside(const FlashForward& call) {
  const AttentionProblem& problem = call.problem;
  const FlashPlan& plan = call.plan;
  const auto block = static_cast<int>(blockIdx.x);
  if (!problem.packed() || plan.rows_above != 0 || block % plan.items != 0) return;
  const int batch = block / plan.items / plan.grid_heads;
  const int head0 = block / plan.items % plan.grid_heads * plan.pack;
  const FlashSequence sequence = flash_sequence(problem, batch);
  const auto value_dim = static_cast<int>(problem.value_dim);
  const auto clear = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * plan.pack + warp_index(); row < end * plan.pack;
         row += static_cast<int>(blockDim.x) / kWarpSize) {
      const int64_t token = row / plan.pack, head = head0 + row % plan.pack;
      T* out = static_cast<T*>(call.out) + (token * problem.heads + head) * value_dim;
      for (int column = lane_index(); column < value_dim; column += kWarpSize) {
        out[column] = from_float<T>(0.0f);
      }
      if (lane_index() == 0) call.lse[head * problem.total_q + token] = -INFINITY;
    }
  };
  const bool is_last = batch == problem.batch - 1;
  if (batch == 0) clear(0, sequence.q_begin);
  clear(sequence.q_begin + sequence.q_len,
        is_last ? problem.total_q : int64_t{problem.cu_seqlens_q[batch + 1]});
}

}  // namespace pumice::cuda
