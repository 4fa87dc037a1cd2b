// What the int4 operators ask of the CPU kernels: plain structs, and one table of functions for
// each instruction set. Every function is single-threaded and works on a range; the operators
// (ops_int4.cpp) spread ranges over threads. No torch here.
#pragma once

#include <cstdint>

#include "common/intn_layout.h"

namespace pumice::cpu {

struct Int4WeightKernels {
  // Rows [begin, end) of q, uint8 [N, K], packed; false if a value is 2^bits or more.
  bool (*pack_rows)(const uint8_t* q, int64_t k, int bits, uint32_t* qweight, int64_t begin,
                    int64_t end);
  void (*unpack_rows)(const uint32_t* qweight, int64_t k, int bits, uint8_t* q, int64_t begin,
                      int64_t end);
  // Rows [begin, end) of W; `row` is room for K floats.
  void (*dequantize_rows)(const IntnWeight& weight, void* out, DType out_dtype, float* row,
                          int64_t begin, int64_t end);
};

// y = x · W^T + extra · extra_weight^T + bias, all of x in fp32.
struct Int4GemmJob {
  IntnWeight weight;
  const float* x;  // [M, K], columns in the order of the weight's
  int64_t m;
  const float* extra;  // [M, outlier_weight.columns + lora_b.columns]
  MatrixView outlier_weight, lora_b;
  VectorView bias;
  void* y;  // [M, N]
  DType y_dtype;
};

struct Int4GemmKernels {
  // Rows [begin, end) of out, fp32 [M, K]: columns perm[k] of x, of any dtype.
  void (*gather_rows)(const void* x, DType dtype, int64_t k, const int32_t* perm, float* out,
                      int64_t begin, int64_t end);
  // The same, rounded to int8 with one scale for each kActivationChunk, times that scale.
  void (*round_rows)(float* x, int64_t k, int64_t begin, int64_t end);
  // Columns [n_begin, n_end) of y; `row` is room for K and the columns of extra.
  void (*gemm)(const Int4GemmJob& job, float* row, int64_t n_begin, int64_t n_end);
};

// int8 activations have one scale for this many input features.
constexpr int64_t kActivationChunk = 32;

#define PUMICE_DECLARE_INT4_KERNELS(isa)              \
  namespace isa {                                     \
  extern const Int4WeightKernels int4_weight_kernels; \
  extern const Int4GemmKernels int4_gemm_kernels;     \
  }
PUMICE_DECLARE_INT4_KERNELS(portable)
PUMICE_DECLARE_INT4_KERNELS(avx2)
PUMICE_DECLARE_INT4_KERNELS(avx512vnni)
#undef PUMICE_DECLARE_INT4_KERNELS

}  // namespace pumice::cpu
