// kernel: attention_align
//
// For operands that cp.async cannot read in pieces of 16 bytes (a head dim that is no multiple of
// 8, a view with odd strides): a copy with padded rows, a warp for each. Reads and writes the
// operand once, at 4.0 TB/s; expected half of that. Beside attention over S keys it costs some 1 /
// S.
#include <algorithm>

#include "cuda/attention/attention_helpers.h"
#include "cuda/launch.h"

namespace pumice::cuda {
namespace {

constexpr int kAlignWarps = 8;

__global__ void attention_align_kernel(const __grid_constant__ AlignRows align) {
  const int64_t rows = align.batch * align.tokens * align.heads;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kAlignWarps;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kAlignWarps + warp_index(); row < rows;
       row += step) {
    const int64_t head = row % align.heads, token = row / align.heads % align.tokens;
    const auto* source = static_cast<const uint16_t*>(align.source.data) +
                         row / align.heads / align.tokens * align.source.batch_stride +
                         token * align.source.token_stride + head * align.source.head_stride;
    uint16_t* copy = static_cast<uint16_t*>(align.copy) + row * align.stride;
    for (int64_t d = lane_index(); d < align.stride; d += kWarpSize) {
      copy[d] = d < align.dim ? source[d] : uint16_t{0};
    }
  }
}

}  // namespace

void attention_align(const AlignRows& align, int sm_count, cudaStream_t stream) {
  const int64_t rows = align.batch * align.tokens * align.heads;
  if (rows == 0) return;
  const int64_t blocks =
      std::min<int64_t>((rows + kAlignWarps - 1) / kAlignWarps, int64_t{16} * sm_count);
  launch(attention_align_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kAlignWarps * kWarpSize),
         0, stream, align);
}

}  // namespace pumice::cuda
