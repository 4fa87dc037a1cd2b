// The product of int4 2:4 weights and fp16 tokens. The floor holds for bf16, too.
//
// Few tokens: N·K·(1/4 + 1/8) bytes, and a scale for each group: 8192 × 8192 in groups of 128: 26.2
// MB, 5.5 µs at the 4.8 TB/s of an H200, 7.8 at the 3.35 of an H100 (int4 7.2 and 10.3, bf16 28.0
// and 40.1). At the former rate 32 rows × 128 columns, 1.5 KB, arrive at an SM in 74 clocks, 300
// issue slots; at 8 tokens they take 330 (360 in bf16), counted in the machine code, and 76 of its
// clocks of shared memory, where values are read four times, as each lane needs a byte of 4 words.
// Expected on an H200 60 % of the rate, 9 µs, up to 8 tokens; 40 % at 32 and 25 % at 64 tokens,
// whose fragments of x take 64 and 128 clocks. None of this is measured.
#include "cuda/sparse/sparse24_launch.h"

namespace pumice::cuda {

void sparse24_gemm_int4_fp16(const Sparse24Product& product, const Sparse24Plan& plan, bool aligned,
                             cudaStream_t stream) {
  launch_sparse24_int4<__half>(product, plan, aligned, stream);
}

}  // namespace pumice::cuda
