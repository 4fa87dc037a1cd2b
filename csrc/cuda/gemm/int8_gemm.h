// Launching the int8 matrix products. Host code, and what the kernels take.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cuda/device.h"
#include "cuda/gemm/int8_tiles.h"

namespace pumice::cuda {

// y[m,n] = (scale[m]·Σ_k q[m,k]·weight[n,k] + outliers) · weight_scale[n] + bias[n]
struct Int8Product {
  const int8_t* weight;  // [n, k]
  const float* weight_scale;
  int64_t weight_scale_stride;  // 1, or 0 where one scale serves all rows
  VectorView bias;
  void* y;  // [m, n]
  DType y_dtype;
  int64_t m, n, k;
};

struct Int8Tokens {
  const int8_t* q;  // [m, stride]
  int64_t stride;
  const float* scale;
  int64_t scale_stride;  // 1 or 0
};

// outliers = Σ_{k∈O} r[m,k]·weight[n,k], with r = x - scale·q in 16 bit and O the union of the
// partial masks. q = round(x·inverse_scale) is computed anew, which is cheaper than fetching it.
struct Int8Outliers {
  const void* x;  // [m, k] of the dtype of y, or null: none
  const float* inverse_scale;
  float threshold;
  bool per_element;  // r only where the element itself is an outlier
  const uint32_t* partial_masks;
  int masks;
  int mask_words;
};

struct Int8Device {
  int sm_count;
  size_t shared_memory_limit;
};

// How int8_gemm will go about a product, and what it needs for that in global memory.
struct Int8GemmSetup {
  Int8Plan plan;
  bool aligned;
  int64_t partial_bytes;
  int64_t tickets;  // words, which must be zero at the launch
};
Int8GemmSetup plan_int8_gemm(const Int8Product& product, const int8_t* q, int64_t q_stride,
                             bool outliers, const Int8Device& device);

// Any shape; made for m > 32.
void int8_gemm(const Int8Product& product, const Int8Tokens& tokens, const Int8Outliers& outliers,
               const Int8GemmSetup& setup, int32_t* partial_sums, uint32_t* tickets,
               const Int8Device& device, cudaStream_t stream);

// m ≤ kSmallM tokens: bound by the bandwidth of the weights.
constexpr int kSmallM = 32;
void int8_small_m(const Int8Product& product, const Int8Tokens& tokens, const Int8Device& device,
                  cudaStream_t stream);
// The same with x [m, k] of x_dtype, not quantized: less error for the same bytes of weights.
void int8_small_m(const Int8Product& product, const void* x, DType x_dtype,
                  const Int8Device& device, cudaStream_t stream);

}  // namespace pumice::cuda
