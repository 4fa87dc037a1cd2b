// kernel: paged_forward_bytes
//
// Attention of 16-bit queries to a paged cache of bytes, float8 e4m3 or int8: copied as bytes, and
// widened on the way from shared memory to the tensor cores (cache_tile.h).
//
// Floor while decoding: half the bytes of a 16-bit cache, half its time. On an H200 17 bytes arrive
// at an SM in a clock. Widening 4 bytes takes 3 instructions of float8 to fp16, 6 or 7 of int8 and
// 9 of float8 to bf16 (sm_80: 14 and 20 of float8), of which an SM issues 64 lanes in a clock: for
// 17 bytes 0.2, 0.4 and 0.6 clocks, beside what the tensor cores do. Expected 85 % of the bytes'
// time with int8 or fp16, 80 % with float8 and bf16. With many queries each warp widens the whole
// tile for its own 32 rows, which at D = 128 takes longer than the products do: expected 60 % of
// the rate with a 16-bit cache. Counted, not measured: no GPU was at hand.
#include "cuda/attention/paged_forward_kernel.h"

namespace pumice::cuda {

void paged_bytes_fp16(const PagedForward& call, int64_t blocks, cudaStream_t stream) {
  if (call.cache.type == CacheType::kInt8) {
    return launch_paged_forward_bytes<__half, CacheType::kInt8>(call, blocks, stream);
  }
  launch_paged_forward_bytes<__half, CacheType::kFloat8E4M3>(call, blocks, stream);
}

}  // namespace pumice::cuda
