// kernel: flash_backward_rows
//
// delta[i] = out[i]·grad_out[i] - grad_lse[i] of every query and head, and what the other kernels
// of flash_backward want of it: 32 or, for short rows, 16 lanes to a row, neighbouring rows being
// neighbouring tokens, as in lse. Reads out and grad_out once, at 4.0 TB/s, 0.5 ms for 16 heads of
// 128 and 128k tokens; expected 80 % of that. Beside attention over S keys it costs some 1 / S.
#include "cuda/attention/flash_backward.h"
#include "cuda/attention/flash_softmax.h"
#include "cuda/element.h"
#include "cuda/launch.h"

namespace pumice::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    flash_backward_rows_kernel(const __grid_constant__ FlashBackward call, int lanes) {
  const AttentionProblem& problem = call.problem;
  const int64_t tokens = problem.packed() ? problem.total_q : problem.max_q;
  const int64_t rows = (problem.packed() ? 1 : problem.batch) * problem.heads * tokens;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % lanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / lanes) + thread / lanes;
  const bool exists = row < rows;
  float sum = 0.0f;
  if (exists) {
    const int64_t i = row % tokens, h = row / tokens % problem.heads;
    const int64_t batch = row / tokens / problem.heads;
    const auto first = [&](const TokenView& view) {
      return static_cast<const T*>(view.data) + token_offset(view, batch, 0, i, h);
    };
    const T *out = first(call.out), *grad_out = first(call.row_grad_out);
    const auto dim = static_cast<int>(problem.value_dim);
#pragma unroll 4
    for (int d = lane; d < dim; d += lanes) sum += to_float(out[d]) * to_float(grad_out[d]);
  }
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(kFullWarp, sum, offset);
  }
  if (!exists || lane != 0) return;
  const float delta = call.grad_lse == nullptr ? sum : sum - call.grad_lse[row];
  call.delta[row] = delta;
  const float lse = call.lse[row];
  const bool sees = lse != -INFINITY;
  call.rows[row] = {sees ? lse * kLog2E : INFINITY, sees ? delta : 0.0f};
}

}  // namespace

void flash_backward_rows(const FlashBackward& call, cudaStream_t stream) {
  const AttentionProblem& problem = call.problem;
  const int64_t rows = problem.total_q * problem.heads;
  if (rows == 0) return;
  const int lanes = problem.value_dim <= 64 ? kWarpSize / 2 : kWarpSize;
  const int64_t rows_of_block = kThreads / lanes;
  const int64_t blocks = (rows + rows_of_block - 1) / rows_of_block;
  STD_TORCH_CHECK(blocks <= INT32_MAX, "pumice::flash_attention_backward: ", rows,
                  " queries of all heads are too many for one launch");
  dispatch_element(problem.dtype, [&](auto element) {
    launch(flash_backward_rows_kernel<decltype(element)>, dim3(static_cast<unsigned>(blocks)),
           dim3(kThreads), 0, stream, call, lanes);
  });
}

}  // namespace pumice::cuda
