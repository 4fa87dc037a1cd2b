// The 2:4 product of many tokens by torch's own: the weight written out dense. Host code only.
#pragma once

#include "cuda/sparse/sparse24_gemm.h"
#include "cuda/tensor_access.h"

namespace pumice::cuda {

// x [m, k] of the dtype of the product's values, fp32 or 16 bit, and y its [m, n] of the same.
void sparse24_linear_dense(const Sparse24Product& product, const Tensor& x, const Tensor& y);

}  // namespace pumice::cuda
