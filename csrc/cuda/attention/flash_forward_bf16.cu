// Attention of bf16 operands: see flash_forward_fp16.cu.
#include "cuda/attention/flash_forward_kernel.h"

namespace pumice::cuda {

void flash_forward_bf16(const FlashForward& call, int64_t blocks, cudaStream_t stream) {
  launch_flash_forward_16bit<__nv_bfloat16>(call, blocks, stream);
}

}  // namespace pumice::cuda
