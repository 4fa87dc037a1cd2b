// What the int4 operators ask of the CPU kernels: plain structs, and tables of functions for each
// instruction set. Every function is single-threaded and works on a range; the operators
// (ops_int4.cpp) spread ranges over threads. No torch here.
//
// Three products: in integers, for 4-bit weights in contiguous groups, with few rows of x
// (int4_few_rows.cpp) or more (int4_panel_gemm.cpp); and in fp32, for everything (int4_gemm.cpp).
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

// Activations, M × K, as the weight's columns see them: element k is x[m, perm[k]].
struct Int4Activations {
  const void* x;
  DType dtype;
  int64_t m, k;
  const int32_t* perm;      // null: the identity
  const uint8_t* left_out;  // [K] by column of x: 1 counts as zero. Null: none
};

// What is added to x · W^T: extra · (outlier_weight | lora_b)^T + bias.
struct Int4Epilogue {
  const float* extra;  // [M, outlier_weight.columns + lora_b.columns]
  MatrixView outlier_weight, lora_b;
  VectorView bias;
  void* y;  // [M, N], rows y_stride apart
  DType y_dtype;
  int64_t y_stride;
  int64_t extras() const { return outlier_weight.columns + lora_b.columns; }
};

struct Int4GemmJob {
  IntnWeight weight;
  const float* x;  // [M, K]
  int64_t m;
  Int4Epilogue epilogue;
};

struct Int4GemmKernels {
  // Rows [begin, end) of the activations as fp32.
  void (*gather_rows)(const Int4Activations& x, float* out, int64_t begin, int64_t end);
  // The same, each multiple of its int8 scale (see kActivationBlock).
  void (*round_rows)(const Int4Activations& x, float* out, int64_t begin, int64_t end);
  // Rows [begin, end) of out [M, rows of factor] = x · factor^T; `row` is room for K floats. out
  // has rows of `stride`.
  void (*multiply_rows)(const float* x, int64_t k, const MatrixView& factor, float* row, float* out,
                        int64_t stride, int64_t begin, int64_t end);
  // Columns [n_begin, n_end) of y; `scratch` is room for gemm_scratch() floats.
  void (*gemm)(const Int4GemmJob& job, float* scratch, int64_t n_begin, int64_t n_end);
  int64_t (*gemm_scratch)(int64_t k, int64_t extras);
};

// Activations share a scale with others of their row in blocks of so many input features.
constexpr int64_t kActivationBlock = 128;
constexpr int64_t kBlockWords = kActivationBlock / 8;  // of 4-bit weights

// A stretch of words of a row that lies in one block and in one group.
struct Int4Segment {
  int32_t begin, end;  // words, counted from the beginning of the block
  int32_t group;
};

// Behind the statistics of a row, so that a register can be read from any of them.
constexpr int64_t kStatisticsPad = 16;

// A product in integers: of the weight's nibbles and the activations' digits (int4_activations.h).
struct Int4DigitJob {
  IntnWeight weight;
  Int4Activations x;
  int planes;  // digits of an activation: 1, 2 or 4
  int64_t blocks;
  const int32_t* block_segments;  // [blocks + 1]: block b has segments [b], … [b + 1] - 1
  const Int4Segment* segments;
  const int32_t* word_segments;  // [blocks · kBlockWords]: of each word, in its block
  int32_t* digits;               // the activations, digits_per_row() for each row
  float* statistics;             // of their segments, statistics_per_row() for each row
  Int4Epilogue epilogue;

  int64_t terms() const { return (planes + 1) / 2; }
  int64_t segment_count() const { return block_segments[blocks]; }
  int64_t digits_per_row() const { return blocks * planes * kBlockWords * 2; }
  int64_t statistics_per_row() const { return segment_count() * (1 + terms()) + kStatisticsPad; }
};

constexpr int64_t kTileRows = 16;
constexpr int64_t kMaxDigitRows = 256;

struct Int4DigitKernels {
  bool exist;  // on this instruction set
  // Digits and statistics of rows [begin, end), begin a multiple of kTileRows; `row` is room for
  // blocks · kActivationBlock floats.
  void (*prepare)(const Int4DigitJob& job, float* row, int64_t begin, int64_t end);
  // The block of y of rows [m_begin, m_end), at most kMaxDigitRows and m_begin a multiple of
  // kTileRows, and of columns [n_begin, n_end), n_begin a multiple of 16; `scratch` is room for
  // scratch() floats.
  void (*gemm)(const Int4DigitJob& job, float* scratch, int64_t m_begin, int64_t m_end,
               int64_t n_begin, int64_t n_end);
  int64_t (*scratch)(const Int4DigitJob& job);
};

// Up to so many rows of x are multiplied by dot products along K, more by panels.
constexpr int64_t kFewRows = 4;

#define PUMICE_DECLARE_INT4_KERNELS(isa)              \
  namespace isa {                                     \
  extern const Int4WeightKernels int4_weight_kernels; \
  extern const Int4GemmKernels int4_gemm_kernels;     \
  extern const Int4DigitKernels int4_few_kernels;     \
  extern const Int4DigitKernels int4_panel_kernels;   \
  }
PUMICE_DECLARE_INT4_KERNELS(portable)
PUMICE_DECLARE_INT4_KERNELS(avx2)
PUMICE_DECLARE_INT4_KERNELS(avx512vnni)
#undef PUMICE_DECLARE_INT4_KERNELS

}  // namespace pumice::cpu
