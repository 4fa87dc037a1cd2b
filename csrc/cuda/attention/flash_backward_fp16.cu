// kernel: flash_backward_keys
// kernel: flash_backward_queries
//
// The gradients of fp16 operands.
#include "cuda/attention/flash_backward_16bit.h"

namespace pumice::cuda {

void flash_backward_fp16(const FlashBackward& call, size_t shared_memory_limit,
                         cudaStream_t stream) {
  launch_flash_backward_16bit<__half>(call, shared_memory_limit, stream);
}

}  // namespace pumice::cuda
