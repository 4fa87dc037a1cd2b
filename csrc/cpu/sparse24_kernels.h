// What the 2:4 operators ask of the CPU kernels: plain structs, and tables of functions for each
// instruction set. Every function is single-threaded and works on a range; the operators
// (ops_sparse24.cpp) spread ranges over threads. No torch here.
//
// Few rows of x are multiplied by the kept weights alone: each picks its element of x in a register
// (sparse24_*few_rows.cpp), so that half the weight's bytes are read, and those of its places. With
// more rows the weight's rows lie in the lanes of registers, decoded once for all rows of x
// (sparse24_*panel.cpp); where there is no such kernel a chunk of the weight is decompressed into
// caches and multiplied by the dense kernels.
#pragma once

#include <cstdint>

#include "common/intn_layout.h"
#include "common/sparse24_layout.h"
#include "cpu/int4_kernels.h"

namespace pumice::cpu {

// Matrices of elements of 1, 2 or 4 bytes; a row of values holds k/2.
struct Sparse24WeightKernels {
  // Rows [begin, end) of values and meta from those of w. Returns the first row that is not 2:4, or
  // end; *group becomes its first group with more than two nonzeros.
  int64_t (*compress_rows)(const void* w, int64_t element, bool floating, int64_t k, void* values,
                           uint8_t* meta, int64_t begin, int64_t end, int64_t* group);
  // The values of w at the places of meta.
  void (*gather_rows)(const void* w, const uint8_t* meta, int64_t element, int64_t k, void* values,
                      int64_t begin, int64_t end);
  // Row begin of the matrix goes to the beginning of w.
  void (*decompress_rows)(const void* values, const uint8_t* meta, int64_t element, int64_t k,
                          void* w, int64_t begin, int64_t end);
};

// y[m,n] = Σ_j x[m,c(n,j)] · values[n,j] + bias[n] of floating-point weights.
struct Sparse24FloatJob {
  const void* x;  // [M, K]
  const void* values;
  const uint8_t* meta;
  DType dtype;  // of x, values and y
  VectorView bias;
  void* y;  // [M, N]
  int64_t m, n, k;
  void* prepared;  // what prepare leaves of x
};

// Each takes and leaves fp32 [M, prepared_row(K)] in `prepared`.
struct Sparse24FloatKernels {
  int64_t (*prepared_row)(int64_t k);  // floats
  // `row` is room for as many.
  void (*prepare)(const Sparse24FloatJob& job, float* row);
  // Columns [begin, end) of y.
  void (*gemm)(const Sparse24FloatJob& job, int64_t begin, int64_t end);
};

// Products of panels of weight rows with tiles of rows of x.
struct Sparse24PanelShape {
  int64_t tile_rows;  // of x, at most
  int64_t columns;    // of y, side by side
  int64_t element;    // bytes of one of x, prepared
};

struct Sparse24FloatPanelKernels {
  bool exist;  // else decompress; only few_rows is set
  // Up to so many rows of x the kernels for few rows are faster.
  int64_t (*few_rows)(DType dtype);
  Sparse24PanelShape (*shape)(DType dtype);
  // Bytes that gemm needs for so many rows of x.
  int64_t (*scratch_bytes)(DType dtype, int64_t rows);
  // Of ceil(M / tile_rows) tiles those in [begin, end). `prepared` holds M·K elements.
  void (*prepare)(const Sparse24FloatJob& job, int64_t begin, int64_t end);
  // Tiles [tile_begin, tile_end) of the rows of y and columns [begin, end).
  void (*gemm)(const Sparse24FloatJob& job, void* scratch, int64_t tile_begin, int64_t tile_end,
               int64_t begin, int64_t end);
};

// y[m,n] = Σ_j q[m,c(n,j)] · values[n,j] · scale[m] · weight_scale[n] + bias[n] in int8.
struct Sparse24Int8Job {
  const int8_t* q;  // [M, K]
  const float* scale;
  int64_t scale_stride;  // 1, or 0 where one scale serves all rows
  const int8_t* values;
  const uint8_t* meta;
  const float* weight_scale;
  int64_t weight_scale_stride;
  VectorView bias;
  void* y;  // [M, N]
  DType y_dtype;
  int64_t m, n, k;
  uint8_t* prepared;  // [M, prepared_row(K)]
};

struct Sparse24Int8Kernels {
  int64_t few_rows;
  int64_t (*prepared_row)(int64_t k);  // bytes
  // `row` is room for as many.
  void (*prepare)(const Sparse24Int8Job& job, uint8_t* row);
  void (*gemm)(const Sparse24Int8Job& job, int64_t begin, int64_t end);
};

// The same for more rows, in panels of weight rows.
struct Sparse24Int8PanelKernels {
  bool exist;                          // false where the instruction set has no such kernel
  int64_t rows, columns;               // of y that gemm takes at a time
  int64_t (*prepared_row)(int64_t k);  // bytes
  // Rows [begin, end) of q.
  void (*prepare)(const Sparse24Int8Job& job, int64_t begin, int64_t end);
  int64_t (*scratch)();  // bytes that gemm needs
  // Rows [m_begin, m_end) and columns [n_begin, n_end) of y.
  void (*gemm)(const Sparse24Int8Job& job, void* scratch, int64_t m_begin, int64_t m_end,
               int64_t n_begin, int64_t n_end);
};

// y[m,n] = Σ_j x[m,c(n,j)] · (q[n,j] - zero) · scale + bias[n] of packed 4-bit weights, in
// integers: of the weight's nibbles and the activations' digits (int4_activations.h).
struct Sparse24Int4Job {
  const void* x;  // [M, K]
  DType dtype;    // of x and y
  IntnWeight kept;
  const uint8_t* meta;
  VectorView bias;
  void* y;  // [M, N]
  int64_t m, k;
  int planes;       // digits of an activation: 2 or 4
  uint8_t* digits;  // [M, digits_row()]
  float* scales;    // [M, blocks()], of the digits

  int64_t blocks() const { return (k + kActivationBlock - 1) / kActivationBlock; }
  int64_t digits_row() const { return blocks() * planes * kActivationBlock; }
};

// Rows of x are prepared, and blocks of them multiplied, from multiples of so many on.
constexpr int64_t kSparseTileMultiple = 8;

struct Sparse24Int4Kernels {
  bool exist;  // on this instruction set
  // Digits and scales of rows [begin, end); `row` is room for blocks() · kActivationBlock floats.
  void (*prepare)(const Sparse24Int4Job& job, float* row, int64_t begin, int64_t end);
  // The block of y of rows [m_begin, m_end), at most kMaxDigitRows, and of columns [n_begin,
  // n_end), n_begin a multiple of 16; `scratch` is room for scratch() floats.
  void (*gemm)(const Sparse24Int4Job& job, float* scratch, int64_t m_begin, int64_t m_end,
               int64_t n_begin, int64_t n_end);
  int64_t (*scratch)(const Sparse24Int4Job& job);
};

#define PUMICE_DECLARE_SPARSE24_KERNELS(isa)                           \
  namespace isa {                                                      \
  extern const Sparse24WeightKernels sparse24_weight_kernels;          \
  extern const Sparse24FloatKernels sparse24_float_kernels;            \
  extern const Sparse24FloatPanelKernels sparse24_float_panel_kernels; \
  extern const Sparse24Int8Kernels sparse24_int8_kernels;              \
  extern const Sparse24Int8PanelKernels sparse24_int8_panel_kernels;   \
  extern const Sparse24Int4Kernels sparse24_int4_kernels;              \
  }
PUMICE_DECLARE_SPARSE24_KERNELS(portable)
PUMICE_DECLARE_SPARSE24_KERNELS(avx2)
PUMICE_DECLARE_SPARSE24_KERNELS(avx512vnni)
#undef PUMICE_DECLARE_SPARSE24_KERNELS
namespace avx512bf16 {
extern const Sparse24FloatPanelKernels sparse24_float_panel_kernels;
}

}  // namespace pumice::cpu
