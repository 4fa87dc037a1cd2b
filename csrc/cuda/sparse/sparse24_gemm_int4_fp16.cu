// The product of int4 2:4 weights and fp16 tokens. The floor holds for bf16, too.
//
// Few tokens: N·K·(1/4 + 1/8) bytes, and a scale for each group: 8192 × 8192 in groups of 128: 26.2
// MB, 6.1 µs at 4.3 TB/s (int4 8.0 µs, bf16 31.2 µs). For 32 rows × 64 columns, 768 bytes, that
// rate leaves 41 clocks of an SM: 8 tokens take 24 of them for fragments from shared memory (values
// are read 4 times, as each lane needs a byte of 4 words), and some 100 of 164 issue slots.
// Expected 65 % of the rate, 9.4 µs, up to 16 tokens; at 32 and 64 tokens, whose fragments take 52
// and 84 clocks, 45 and 30 %. None of this is measured.
#include "cuda/sparse/sparse24_launch.h"

namespace pumice::cuda {

void sparse24_gemm_int4_fp16(const Sparse24Product& product, const Sparse24Plan& plan, bool aligned,
                             cudaStream_t stream) {
  launch_sparse24_int4<__half>(product, plan, aligned, stream);
}

}  // namespace pumice::cuda
