// Launching the int4 matrix product. Host code, and what the kernels take.
#pragma once

#include "common/intn_layout.h"
#include "cuda/device.h"
#include "cuda/gemm/int4_tiles.h"

namespace pumice::cuda {

// x in 16 bit, rows on boundaries of 16 bytes: the caller's own, or made by int4_prepare.
struct Int4Tokens {
  const void* high;  // [m, stride]
  const void* low;   // [m, stride], for fp32 x = high + low in bf16
  int64_t stride;    // elements, a multiple of 8; those from k on are zero
};

// y[m,n] = Σ_k tokens[m,k]·W[n,k] + Σ_j x[m,outlier_idx[j]]·outlier_weight[n,j]
//        + Σ_r low_rank[m,r]·lora_b[n,r] + bias[n]
struct Int4Product {
  IntnWeight weight;
  Int4Tokens tokens;
  const void* x;  // [m, k] of y_dtype
  const int32_t* outlier_idx;
  MatrixView outlier_weight;  // [n, outliers]
  const float* low_rank;      // [m, lora_b.columns]
  MatrixView lora_b;
  VectorView bias;
  void* y;  // [m, n]
  DType y_dtype;
  int64_t m;
  // Where K is cut into parts: their sums, and tickets, zero at the launch.
  float* partial_sums;
  uint32_t* tickets;
};

// Scales are applied to exact sums of integers, if at least 32 neighbouring values of K share one:
// 4 bits, no g_idx, zero points that are integers, groups of a multiple of 32. All else takes the
// general path, which rounds each weight to the 16 bits of x before it multiplies.
inline bool int4_is_general(const IntnWeight& weight) {
  return weight.bits != 4 || weight.g_idx != nullptr || weight.zero_kind == ZeroKind::kFloat ||
         (weight.groups > 1 && weight.group_size % kInt4ChunkK != 0);
}

void int4_gemm(const Int4Product& product, const Int4Plan& plan, cudaStream_t stream);

// By the type of x; int4_gemm chooses.
void int4_gemm_fp16(const Int4Product& product, const Int4Plan& plan, cudaStream_t stream);
void int4_gemm_bf16(const Int4Product& product, const Int4Plan& plan, cudaStream_t stream);
void int4_gemm_fp32(const Int4Product& product, const Int4Plan& plan, cudaStream_t stream);

// What comes before the product, in one launch: x in 16 bit, in the order of perm, some columns once
// more behind them, then zeros, in rows of whole 16 bytes; low_rank = x·lora_aᵀ; tickets to zero. Each only where its pointer is not null.
struct Int4Preparation {
  const void* x;  // [m, k]
  DType dtype;
  int64_t m, k;
  const int32_t* perm;  // or null
  const int32_t* appended_idx;
  int64_t appended;  // columns of x, stored from place k on
  void* high;
  void* low;  // not null if and only if x is fp32 and high is not null
  int64_t stride;  // at least k + appended
  MatrixView lora_a;  // [rank, k]
  float* low_rank;    // [m, rank]
  uint32_t* tickets;
  int64_t ticket_count;
};
void int4_prepare(const Int4Preparation& preparation, int sm_count, cudaStream_t stream);

}  // namespace pumice::cuda
