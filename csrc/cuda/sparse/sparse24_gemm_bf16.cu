// The 2:4 product of bf16; see sparse24_gemm_fp16.cu.
#include "cuda/sparse/sparse24_launch.h"

namespace pumice::cuda {

void sparse24_gemm_bf16(const Sparse24Product& product, const Sparse24Plan& plan, bool aligned,
                        cudaStream_t stream) {
  launch_sparse24<Sparse24Values16<__nv_bfloat16>>(product, plan, aligned, stream);
}

}  // namespace pumice::cuda
