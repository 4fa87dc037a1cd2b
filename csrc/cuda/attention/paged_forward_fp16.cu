// kernel: paged_forward
//
// Attention of fp16 operands to a paged cache: paged_forward_kernel.h.
//
// Floor and expectation while decoding are those of flash_forward (flash_tiles.h): keys and values
// are read once, a row of D = 128 in two whole lines whatever its block; the table adds 4 bytes for
// each block of keys and values.
#include "cuda/attention/paged_forward_kernel.h"

namespace pumice::cuda {

void paged_forward_fp16(const PagedForward& call, int64_t blocks, cudaStream_t stream) {
  launch_paged_forward_16bit<__half>(call, blocks, stream);
}

void paged_forward(const PagedForward& call, int64_t blocks, cudaStream_t stream) {
  const bool bytes = call.cache.type != CacheType::kQuery;
  switch (call.problem.dtype) {
    case DType::kFloat16:
      return (bytes ? paged_bytes_fp16 : paged_forward_fp16)(call, blocks, stream);
    case DType::kBFloat16:
      return (bytes ? paged_bytes_bf16 : paged_forward_bf16)(call, blocks, stream);
    default:
      return paged_forward_fp32(call, blocks, stream);
  }
}

}  // namespace pumice::cuda
