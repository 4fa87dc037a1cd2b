// The 2:4 product of int8 tokens and int8 weights, exact in int32, scaled in fp32.
//
// Few tokens: N·K·(1/2 + 1/8) bytes; 8192 × 8192: 41.9 MB, 8.7 µs at the 4.8 TB/s of an H200, 12.5
// at the 3.35 of an H100 (dense int8 14.0 and 20.0). Expected 80 % of that rate at 8 tokens: the
// metadata of rows g and g + 8 share banks.
// M = N = K = 8192: 278 µs at 3958 TOPS, of which shared memory allows 43 % and 40 % are expected.
#include "cuda/sparse/sparse24_launch.h"

namespace pumice::cuda {

void sparse24_gemm_int8(const Sparse24Product& product, const Sparse24Plan& plan, bool aligned,
                        cudaStream_t stream) {
  launch_sparse24<Sparse24ValuesInt8>(product, plan, aligned, stream);
}

}  // namespace pumice::cuda
