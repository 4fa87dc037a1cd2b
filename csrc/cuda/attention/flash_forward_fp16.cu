// kernel: flash_forward
//
// Attention of fp16 operands: flash_forward_kernel.h.
#include "cuda/attention/flash_forward_kernel.h"

namespace pumice::cuda {

void flash_forward_fp16(const FlashForward& call, int64_t blocks, cudaStream_t stream) {
  launch_flash_forward_16bit<__half>(call, blocks, stream);
}

void flash_forward(const FlashForward& call, int64_t blocks, cudaStream_t stream) {
  switch (call.problem.dtype) {
    case DType::kFloat16:
      return flash_forward_fp16(call, blocks, stream);
    case DType::kBFloat16:
      return flash_forward_bf16(call, blocks, stream);
    default:
      return flash_forward_fp32(call, blocks, stream);
  }
}

}  // namespace pumice::cuda
