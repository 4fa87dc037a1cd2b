// kernel: flash_backward_keys
// kernel: flash_backward_queries
//
// The gradients of bf16 operands.
#include "cuda/attention/flash_backward_16bit.h"

namespace pumice::cuda {

void flash_backward_bf16(const FlashBackward& call, size_t shared_memory_limit,
                         cudaStream_t stream) {
  launch_flash_backward_16bit<__nv_bfloat16>(call, shared_memory_limit, stream);
}

}  // namespace pumice::cuda
