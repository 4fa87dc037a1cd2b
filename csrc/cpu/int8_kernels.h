// What the int8 operators ask of the CPU kernels: plain structs, and one table of functions for
// each instruction set. Every function is single-threaded and works on a range; the operators
// (ops_int8.cpp) spread ranges over threads. No torch here.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pumice::cpu {

// Rows of x, M × K, on their way to int8. x' = x · smooth; an outlier is an x' with !(|x'| <
// threshold).
struct Int8QuantizeJob {
  const void* x;
  DType dtype;
  int64_t k;
  const float* smooth;  // [K] or null
  bool has_threshold;
  float threshold;
  int8_t* q;          // [M, K]
  float* scale;       // [M]; unused where one scale serves the tensor
  uint8_t* outliers;  // [K], zeroed; set where a column holds an outlier. Null without a threshold
};

// Residuals r = x - scale·q in the outlier columns, for the epilogue of the product. Rows are
// grouped in panels of kPanelRows, one vector register's worth: residual[panel][column][row in
// panel], the last panel padded with zeros.
constexpr int64_t kPanelRows = 16;

struct ResidualJob {
  Int8QuantizeJob quantized;
  int64_t m;
  const int32_t* columns;  // [count], ascending
  int64_t count;
  bool per_element;  // keep a residual only where the element itself is an outlier
  float* residual;
};

struct Int8QuantizeKernels {
  // scale and q of rows [begin, end), each from its own absolute maximum.
  void (*quantize_rows)(const Int8QuantizeJob& job, int64_t begin, int64_t end);
  // The bits of the largest |x'| that is no outlier in rows [begin, end); as integers, magnitudes
  // order like floats, with infinity and then NaN above all.
  int32_t (*absmax_bits)(const Int8QuantizeJob& job, int64_t begin, int64_t end);
  // q of rows [begin, end) with one inverse scale for all; clamped, NaN to 0.
  void (*round_rows)(const Int8QuantizeJob& job, float inverse_scale, int64_t begin, int64_t end);
  // Panels [begin, end).
  void (*residual_panels)(const ResidualJob& job, int64_t begin, int64_t end);
};

// y[m,n] = (scale[m]·Σ_k q[m,k]·weight[n,k] + Σ_j residual[m,j]·weight[n,columns[j]])
//          · weight_scale[n] + bias[n]
struct Int8GemmJob {
  const int8_t* q;  // [M, K]
  const float* scale;
  int64_t scale_stride;  // 1, or 0 where one scale serves all rows
  const int8_t* weight;  // [N, K]
  const float* weight_scale;
  int64_t weight_scale_stride;
  VectorView bias;
  void* y;  // [M, N], rows y_stride apart
  DType y_dtype;
  int64_t y_stride;
  int64_t m, n, k;
  void* prepared;  // M · prepared_row_bytes() of workspace, filled by prepare_rows()
  const int32_t* outlier_columns;
  int64_t outlier_count;
  const float* residual;  // panels, see above
};

// No more rows than this go into one gemm() call: what it keeps for each row lies on the stack.
constexpr int64_t kMaxGemmRows = 128;

struct Int8GemmKernels {
  // What the kernel keeps for each row of q (a wider copy, or a sum), and what it reads of it then.
  int64_t (*prepared_row_bytes)(int64_t k);
  int64_t (*streamed_row_bytes)(int64_t k);
  void (*prepare_rows)(const Int8GemmJob& job, int64_t begin, int64_t end);
  // The block of y of rows [m_begin, m_end), at most kMaxGemmRows of them and m_begin a multiple of
  // kPanelRows, and of columns [n_begin, n_end).
  void (*gemm)(const Int8GemmJob& job, int64_t m_begin, int64_t m_end, int64_t n_begin,
               int64_t n_end);
};

// Each instruction set's tables, defined in int8_quantize.cpp and int8_gemm.cpp.
#define PUMICE_DECLARE_INT8_KERNELS(isa)                  \
  namespace isa {                                         \
  extern const Int8QuantizeKernels int8_quantize_kernels; \
  extern const Int8GemmKernels int8_gemm_kernels;         \
  }
PUMICE_DECLARE_INT8_KERNELS(portable)
PUMICE_DECLARE_INT8_KERNELS(avx2)
PUMICE_DECLARE_INT8_KERNELS(avx512vnni)
#undef PUMICE_DECLARE_INT8_KERNELS

}  // namespace pumice::cpu
