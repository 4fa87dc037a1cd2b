// The 2:4 product of int8 tokens and int8 weights, exact in int32, scaled in fp32.
//
// Few tokens: N·K·(1/2 + 1/8) bytes; 8192 × 8192: 41.9 MB, 9.8 µs at 4.3 TB/s (dense int8 15.6 µs).
// Expected 85 % of that rate: the metadata of rows g and g + 8 share banks.
// M = N = K = 8192: 278 µs at 3958 TOPS, of which 50 % are expected (sparse24_gemm_fp16.cu).
#include "cuda/sparse/sparse24_launch.h"

namespace pumice::cuda {

void sparse24_gemm_int8(const Sparse24Product& product, const Sparse24Plan& plan, bool aligned,
                        cudaStream_t stream) {
  launch_sparse24<Sparse24ValuesInt8>(product, plan, aligned, stream);
}

}  // namespace pumice::cuda
