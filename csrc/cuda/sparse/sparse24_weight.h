// Launching the kernels that compress and decompress 2:4 matrices. Host code.
#pragma once

#include "cuda/device.h"

namespace pumice::cuda {

// The elements of a matrix, as far as these kernels care: how large they are, and which bits are
// not zero in a number that is not zero (all but the sign of a floating-point number).
struct Sparse24Elements {
  int bytes;  // 1, 2 or 4
  uint32_t magnitude;
};

// w [n, k] to values [n, k/2] and meta [n, sparse24_meta_bytes(k)] (common/sparse24_layout.h). Of a
// group with more than two nonzeros the first two are kept.
void sparse24_compress_matrix(const void* w, int64_t n, int64_t k, Sparse24Elements elements,
                              void* values, uint8_t* meta, cudaStream_t stream);

// values[n,j] = w[n, column of kept value j]
void sparse24_gather_matrix(const void* w, const uint8_t* meta, int64_t n, int64_t k, int bytes,
                            void* values, cudaStream_t stream);

// w from values and meta, zero where nothing was kept.
void sparse24_decompress_matrix(const void* values, const uint8_t* meta, int64_t n, int64_t k,
                                int bytes, void* w, cudaStream_t stream);

}  // namespace pumice::cuda
