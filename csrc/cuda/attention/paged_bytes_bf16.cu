// Attention of bf16 queries to a paged cache of bytes: see paged_bytes_fp16.cu.
#include "cuda/attention/paged_forward_kernel.h"

namespace pumice::cuda {

void paged_bytes_bf16(const PagedForward& call, int64_t blocks, cudaStream_t stream) {
  if (call.cache.type == CacheType::kInt8) {
    return launch_paged_forward_bytes<__nv_bfloat16, CacheType::kInt8>(call, blocks, stream);
  }
  launch_paged_forward_bytes<__nv_bfloat16, CacheType::kFloat8E4M3>(call, blocks, stream);
}

}  // namespace pumice::cuda
