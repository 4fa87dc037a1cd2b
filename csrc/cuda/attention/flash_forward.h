// Launching flash attention's forward pass. Host code.
#pragma once

#include "cuda/attention/flash_schedule.h"

namespace pumice::cuda {

// One plan's sequences; `blocks` of them are launched.
void flash_forward(const FlashForward& call, int64_t blocks, cudaStream_t stream);

// By the type of the operands; flash_forward chooses.
void flash_forward_fp16(const FlashForward& call, int64_t blocks, cudaStream_t stream);
void flash_forward_bf16(const FlashForward& call, int64_t blocks, cudaStream_t stream);
void flash_forward_fp32(const FlashForward& call, int64_t blocks, cudaStream_t stream);

// Merges the partial results of the plan's sequences that were cut into parts.
void flash_merge(const FlashForward& call, cudaStream_t stream);

}  // namespace pumice::cuda
