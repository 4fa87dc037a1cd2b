// Attention of bf16 operands to a paged cache: see paged_forward_fp16.cu.
#include "cuda/attention/paged_forward_kernel.h"

namespace pumice::cuda {

void paged_forward_bf16(const PagedForward& call, int64_t blocks, cudaStream_t stream) {
  launch_paged_forward_16bit<__nv_bfloat16>(call, blocks, stream);
}

}  // namespace pumice::cuda
