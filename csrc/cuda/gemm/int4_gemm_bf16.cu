// The int4 product of bf16 activations: see int4_gemm_fp16.cu.
#include "cuda/gemm/int4_gemm_kernel.h"

namespace pumice::cuda {

void int4_gemm_bf16(const Int4Product& product, const Int4Plan& plan, cudaStream_t stream) {
  launch_int4_gemm_16bit<__nv_bfloat16>(product, plan, stream);
}

}  // namespace pumice::cuda
