// 2:4 products with more than a few rows of x where there are no panels (the portable kernels, and
// packed weights of other widths than 4): chunks of the weight are decompressed into memory that
// stays in caches, and multiplied by the dense kernels there.
#pragma once

#include <optional>

#include "common/sparse24_args.h"

namespace pumice::cpu {

// Rows [begin, end) of the matrix, row begin at the beginning of w, in parallel.
void decompress_rows(const Sparse24Weight& weight, int64_t element, void* w, int64_t begin,
                     int64_t end);

// torch's own product, where there are no panels: of fp32 and bf16 in their dtype, of fp16 in fp32,
// where CPUs are faster.
void multiply_decompressed(const Sparse24LinearArgs& args, const std::optional<Tensor>& bias,
                           Tensor& y);

// The tiles of int8_linear, where there are no panels of 2:4 weights.
void multiply_decompressed(const Sparse24Int8LinearArgs& args, Tensor& y);

// Weights of any width and zero points, in fp32.
void multiply_dequantized(const Sparse24Int4LinearArgs& args, const std::optional<Tensor>& bias,
                          Tensor& y);

}  // namespace pumice::cpu
