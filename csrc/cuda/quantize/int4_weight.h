// Launching the kernels that pack, unpack and dequantize weights of a few bits. Host code.
#pragma once

#include "common/intn_layout.h"
#include "cuda/device.h"

namespace pumice::cuda {

// q [n, k] to qweight [n, intn_words(k, bits)]. *too_large, 0 before, becomes 1 if a value does not
// fit into `bits` bits.
void pack_weight(const uint8_t* q, int64_t n, int64_t k, int bits, uint32_t* qweight,
                 uint32_t* too_large, cudaStream_t stream);

void unpack_weight(const uint32_t* qweight, int64_t n, int64_t k, int bits, uint8_t* q,
                   cudaStream_t stream);

// W [n, k] of out_dtype, its rows out_stride ≥ k elements apart; what lies between them is left as
// it is. K < 2^31.
void dequantize_weight(const IntnWeight& weight, void* out, int64_t out_stride, DType out_dtype,
                       cudaStream_t stream);

}  // namespace pumice::cuda
