// Launching the small operators around attention. Host code.
#pragma once

#include "common/attention_problem.h"
#include "cuda/device.h"

namespace pumice::cuda {

// merge_attention: P results [P, tokens, H, D] of B sequences of S tokens, and lses [P, B, H, S].
struct MergeAttention {
  const void* outs;
  const float* lses;
  DType dtype;
  int64_t parts, batch, tokens, heads, dim;  // tokens of a sequence
  void* out;                                 // [B, S, H, D]
  float* lse;                                // [B, H, S]
};
void merge_attention(const MergeAttention& merge, cudaStream_t stream);

// attention_mask_pack: a mask [B, H, S_q, S_k] of bytes, by its strides.
struct MaskPack {
  const uint8_t* mask;
  int64_t strides[4];
  int64_t batch, heads, q_len, k_len;
  uint32_t* bits;   // [B, H, S_q, ceil(S_k / 32)]
  uint8_t* blocks;  // [B, H, ceil(S_q / 64), ceil(S_k / 64)]
};
void attention_mask_pack(const MaskPack& pack, cudaStream_t stream);

// attention_align: a copy whose rows of 16-bit elements are multiples of 16 bytes, padded by zeros.
struct AlignRows {
  TokenView source;
  int64_t batch, tokens, heads, dim;
  void* copy;      // [B, tokens, heads, stride]
  int64_t stride;  // elements, a multiple of 8
};
void attention_align(const AlignRows& align, int sm_count, cudaStream_t stream);

}  // namespace pumice::cuda
