// What an attention kernel is asked, without torch: the operands' shapes and where they lie.
//
// Sizes: batch B, queries S_q, keys S_k, heads H, KV heads H_kv, head dim D, value dim D_v. Dense
// tensors are [B, S, H, D]; packed ones [total, H, D] with cu_seqlens, int32 [B + 1].
#pragma once

#include "common/attention_mask.h"
#include "common/attention_score.h"
#include "common/dtype.h"

namespace pumice {

// Where the vectors [token, head, 0 … D) of a tensor lie; strides in elements, that of the last
// dimension is 1.
struct TokenView {
  const void* data = nullptr;
  int64_t batch_stride = 0, token_stride = 0, head_stride = 0;
};

struct AttentionProblem {
  DType dtype;
  int64_t batch, heads, kv_heads, head_dim, value_dim;
  int64_t max_q, max_k;      // of any sequence
  int64_t total_q, total_k;  // B · S_q where dense
  TokenView query, key, value;
  const int32_t* cu_seqlens_q = nullptr;  // null: dense
  const int32_t* cu_seqlens_k = nullptr;
  AttentionMask mask;
  ScoreRule score;

  PUMICE_HOST_DEVICE_MEMBER bool packed() const { return cu_seqlens_q != nullptr; }
  PUMICE_HOST_DEVICE_MEMBER int64_t group() const { return heads / kv_heads; }
};

}  // namespace pumice
