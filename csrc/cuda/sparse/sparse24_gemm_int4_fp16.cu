// The product of int4 2:4 weights and fp16 tokens. The floor holds for bf16, too.
//
// Few tokens: N·K·(1/4 + 1/8) bytes, and a scale for each group: 8192 × 8192 in groups of 128: 26.2
// MB, 6.1 µs at 4.3 TB/s (int4 8.0 µs, bf16 31.2 µs). That rate leaves 83 clocks of an SM for 32
// rows × 128 columns, 1.5 KB. At 8 tokens these take 330 of its 330 issue slots (360 in bf16),
// counted in the machine code, and 82 of its clocks of shared memory, where values are read four
// times, as each lane needs a byte of 4 words. Expected 60 % of the rate, 10 µs, up to 8 tokens; 45
// % at 32 and 30 % at 64 tokens, whose fragments of x take 64 and 128 clocks. None of this is
// measured.
#include "cuda/sparse/sparse24_launch.h"

namespace pumice::cuda {

void sparse24_gemm_int4_fp16(const Sparse24Product& product, const Sparse24Plan& plan, bool aligned,
                             cudaStream_t stream) {
  launch_sparse24_int4<__half>(product, plan, aligned, stream);
}

}  // namespace pumice::cuda
