// The product of int4 2:4 weights and bf16 tokens; see sparse24_gemm_int4_fp16.cu.
#include "cuda/sparse/sparse24_launch.h"

namespace pumice::cuda {

void sparse24_gemm_int4_bf16(const Sparse24Product& product, const Sparse24Plan& plan, bool aligned,
                             cudaStream_t stream) {
  launch_sparse24_int4<__nv_bfloat16>(product, plan, aligned, stream);
}

}  // namespace pumice::cuda
