// flash_attention_backward on CUDA: what its kernels are asked, and how they are launched.
//
// With P[i,j] = exp(score[i,j] - lse[i]), 0 where j is hidden from i, and f' the slope of the score
// along q·k (softmax_scale, less under softcap):
//
//     delta[i] = out[i]·grad_out[i] - grad_lse[i]
//     dS[i,j]  = P[i,j] · (grad_out[i]·value[j] - delta[i]) · f'
//     grad_value[j] = Σ_i P[i,j]·grad_out[i]     grad_key[j] = Σ_i dS[i,j]·query[i]
//     grad_query[i] = Σ_j dS[i,j]·key[j]
//
// after FlashAttention-2 (Dao, 2023), which has one kernel add to grad_query atomically. Here a
// second kernel computes P and dS once more, along the keys: seven products instead of five, but no
// atomics, no fp32 copy of grad_query, and the same bits in every run and in every batch.
#pragma once

#include "cuda/attention/flash_layout.h"
#include "cuda/device.h"

namespace pumice::cuda {

// What a row of scores brings along, made by flash_backward_rows.
struct FlashGradRow {
  float lse2;   // lse · log2(e); +∞ where the row sees nothing, so that P = 2^(score - lse2) is 0
  float delta;  // 0 there
};

// The kernels' argument.
struct FlashBackward {
  AttentionProblem problem;            // 16-bit operands: rows on boundaries of 16 bytes
  TokenView grad_out;                  // the same
  int32_t key_columns, value_columns;  // elements of a row that can be copied, multiples of 8
  TokenView out;  // with row_grad_out, operands of flash_backward_rows: rows anywhere
  TokenView row_grad_out;
  const float* lse;       // [B, H, S_q], or [H, total_q] where packed
  const float* grad_lse;  // the same, or null
  float* delta;           // the same
  FlashGradRow* rows;     // the same
  void* grad_query;       // contiguous, of the operands' type
  void* grad_key;
  void* grad_value;
};

// Makes delta and rows, which the others read.
void flash_backward_rows(const FlashBackward& call, cudaStream_t stream);

// grad_key and grad_value, and grad_query. Heads up to kFlashGradMaxHeadDim.
constexpr int kFlashGradMaxHeadDim = 256;
void flash_backward_fp16(const FlashBackward& call, size_t shared_memory_limit,
                         cudaStream_t stream);
void flash_backward_bf16(const FlashBackward& call, size_t shared_memory_limit,
                         cudaStream_t stream);
void flash_backward_fp32(const FlashBackward& call, cudaStream_t stream);

}  // namespace pumice::cuda
