// Launching the 2:4 matrix products. Host code, and what the kernels take.
#pragma once

#include "common/intn_layout.h"
#include "common/sparse24_layout.h"
#include "cuda/device.h"
#include "cuda/gemm/unaligned.h"
#include "cuda/sparse/sparse24_tiles.h"

namespace pumice::cuda {

// y[m,n] = f(Σ_j x[m, c(n,j)]·W[n,j]) + bias[n] over the K/2 kept values j of row n, c(n,j) their
// columns (common/sparse24_layout.h).
struct Sparse24Product {
  const void* values;  // [n, k/2], or packed int4: kept.qweight
  const uint8_t* meta;
  const void* x;  // [m, k]: fp32, fp16, bf16, or int8
  VectorView bias;
  void* y;  // [m, y_stride], of which columns 0 .. n - 1 are written
  DType y_dtype;
  int64_t m, n, k, y_stride;

  // int8: f(s) = s · token_scale[m] · weight_scale[n]. Strides are 1, or 0 where one serves all.
  const float* token_scale;
  const float* weight_scale;
  int64_t token_scale_stride, weight_scale_stride;

  IntnWeight kept;  // int4

  // Where K is cut into parts: their sums, and tickets, zero at the launch.
  void* partial_sums;
  uint32_t* tickets;
};

// int4 scales are applied to exact sums of integers, if whole chunks of kSparse24ChunkK columns
// share one; all else is written out in 16 bits first (dequantize_weight of the kept values).
// Groups of kept values are half as long as those of columns.
inline bool sparse24_sums_integers(const IntnWeight& kept) {
  return kept.bits == 4 && 2 * kept.k <= kSparse24MaxInt4K && kept.zero_kind != ZeroKind::kFloat &&
         (kept.groups == 1 || kept.group_size % (kSparse24ChunkK / 2) == 0);
}

// Bytes of a row of values and of x.
template <Sparse24Kind kKind>
int64_t sparse24_value_row_bytes(int64_t k) {
  switch (kKind) {
    case Sparse24Kind::k16Bit:
      return k;
    case Sparse24Kind::kInt8:
      return k / 2;
    default:
      return intn_words(k / 2, 4) * 4;
  }
}
template <Sparse24Kind kKind>
int64_t sparse24_token_row_bytes(int64_t k) {
  return kKind == Sparse24Kind::kInt8 ? k : 2 * k;
}

// Rows of values and of x lie on boundaries of 16 bytes.
template <Sparse24Kind kKind>
bool sparse24_is_aligned(const Sparse24Product& product) {
  return rows_are_aligned_16(product.values, sparse24_value_row_bytes<kKind>(product.k)) &&
         rows_are_aligned_16(product.x, sparse24_token_row_bytes<kKind>(product.k));
}

void sparse24_gemm_fp16(const Sparse24Product& product, const Sparse24Plan& plan, bool aligned,
                        cudaStream_t stream);
void sparse24_gemm_bf16(const Sparse24Product& product, const Sparse24Plan& plan, bool aligned,
                        cudaStream_t stream);
void sparse24_gemm_int8(const Sparse24Product& product, const Sparse24Plan& plan, bool aligned,
                        cudaStream_t stream);
void sparse24_gemm_int4_fp16(const Sparse24Product& product, const Sparse24Plan& plan, bool aligned,
                             cudaStream_t stream);
void sparse24_gemm_int4_bf16(const Sparse24Product& product, const Sparse24Plan& plan, bool aligned,
                             cudaStream_t stream);
// fp32 values and x: x on a boundary of 16 bytes, values on one of 8.
void sparse24_gemm_fp32(const Sparse24Product& product, int sm_count, cudaStream_t stream);

}  // namespace pumice::cuda
