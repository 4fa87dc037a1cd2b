// kernel: merge_attention
//
// out = Σ_p exp(lses[p] - lse) · outs[p] for results of attention over disjoint sets of keys: a
// warp for each token and head (merge_row.h). Reads every result once: P · B · S · H · D elements,
// at 4.0 TB/s; expected 80 % of that from some thousand rows on.
#include "cuda/attention/attention_helpers.h"
#include "cuda/attention/merge_row.h"
#include "cuda/element.h"
#include "cuda/launch.h"

namespace pumice::cuda {
namespace {

constexpr int kWarps = 4;

template <class T>
__global__ void merge_attention_kernel(const __grid_constant__ MergeAttention merge) {
  const int64_t rows = merge.batch * merge.tokens * merge.heads;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp_index();
  if (row >= rows) return;
  const int64_t head = row % merge.heads, token = row / merge.heads % merge.tokens;
  const int64_t batch = row / merge.heads / merge.tokens;
  const int64_t at = (batch * merge.heads + head) * merge.tokens + token;
  const auto* outs = static_cast<const T*>(merge.outs);
  T* out = static_cast<T*>(merge.out) + row * merge.dim;
  const float lse = merge_row(
      static_cast<int>(merge.parts), static_cast<int>(merge.dim), -INFINITY,
      [&](int p) { return merge.lses[p * rows + at]; },
      [&](int p, int column) { return to_float(outs[(p * rows + row) * merge.dim + column]); },
      [&](int column, float value) { out[column] = from_float<T>(value); });
  if (lane_index() == 0) merge.lse[at] = lse;
}

}  // namespace

void merge_attention(const MergeAttention& merge, cudaStream_t stream) {
  const int64_t blocks = (merge.batch * merge.tokens * merge.heads + kWarps - 1) / kWarps;
  STD_TORCH_CHECK(blocks <= INT32_MAX, "pumice::merge_attention: too many rows for one launch");
  dispatch_element(merge.dtype, [&](auto element) {
    launch(merge_attention_kernel<decltype(element)>, dim3(static_cast<unsigned>(blocks)),
           dim3(kWarps * kWarpSize), 0, stream, merge);
  });
}

}  // namespace pumice::cuda
