// kernel: attention_mask_pack
//
// A boolean mask as bits, and what each square of 64 × 64 shows: none, some or all. A block for
// each square; a warp packs 32 columns of a row by one vote. Reads every byte of the mask once, S_q
// · S_k at 4.0 TB/s; expected half of that, for a lane reads one byte.
#include "cuda/attention/attention_helpers.h"
#include "cuda/launch.h"

namespace pumice::cuda {
namespace {

constexpr int kPackWarps = 8;

__global__ void attention_mask_pack_kernel(const __grid_constant__ MaskPack pack) {
  const int64_t squares_n = (pack.k_len + kMaskBlock - 1) / kMaskBlock;
  const int64_t squares_m = (pack.q_len + kMaskBlock - 1) / kMaskBlock;
  const int64_t square = blockIdx.x, n = square % squares_n, m = square / squares_n % squares_m;
  const int64_t matrix = square / squares_n / squares_m;  // batch · heads + head
  const uint8_t* mask =
      pack.mask + matrix / pack.heads * pack.strides[0] + matrix % pack.heads * pack.strides[1];
  const int64_t words = (pack.k_len + 31) / 32;
  bool any = false, all = true;
  for (int r = warp_index(); r < kMaskBlock; r += kPackWarps) {
    const int64_t i = m * kMaskBlock + r;
    if (i >= pack.q_len) break;
#pragma unroll
    for (int half = 0; half < kMaskBlock / 32; ++half) {
      const int64_t j = n * kMaskBlock + half * 32 + lane_index();
      const bool exists = j < pack.k_len;
      const bool shows = exists && mask[i * pack.strides[2] + j * pack.strides[3]] != 0;
      const uint32_t word = __ballot_sync(kFullWarp, shows);
      any |= shows;
      all &= shows || !exists;
      if (lane_index() == 0 && exists) {
        pack.bits[(matrix * pack.q_len + i) * words + n * 2 + half] = word;
      }
    }
  }
  const bool square_any = __syncthreads_or(any), square_all = __syncthreads_and(all);
  if (threadIdx.x == 0) {
    pack.blocks[square] = square_all ? kMaskAll : square_any ? kMaskSome : kMaskNone;
  }
}

}  // namespace

void attention_mask_pack(const MaskPack& pack, cudaStream_t stream) {
  const int64_t squares = (pack.k_len + kMaskBlock - 1) / kMaskBlock *
                          ((pack.q_len + kMaskBlock - 1) / kMaskBlock) * pack.batch * pack.heads;
  STD_TORCH_CHECK(squares <= INT32_MAX,
                  "pumice::attention_mask_pack: the mask is too large for one launch");
  launch(attention_mask_pack_kernel, dim3(static_cast<unsigned>(squares)),
         dim3(kPackWarps * kWarpSize), 0, stream, pack);
}

}  // namespace pumice::cuda
