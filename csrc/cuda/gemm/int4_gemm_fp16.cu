// kernel: int4_gemm
//
// The int4 product of fp16 activations; int4_gemm_kernel.h has the kernel, int4_tiles.h its tiles.
//
// Floor at M ≤ 32, N = K = 8192, groups of 128: 33.5 MB of weights and 1 MB of scales at 4.3 TB/s,
// 8.0 µs (bf16 weights 31.2 µs). Expected 60 % of that rate at M ≤ 16, 13 µs: at 75 % of the issue
// slots taken (int4_gemm_kernel.h), which is what 16 warps on an SM reach; 64 KB of weights under
// way on an SM, where Little's law asks for 26 KB. At M = 32 one block on an SM, and x takes twice
// the bytes of the weights, from L2: some 18 µs.
//
// At M = N = K = 4096: 137 GFLOP = 139 µs at a Hopper's 989 TFLOPS. mma.sync reaches some 62 % of
// that; here each comes with 6 other instructions (1 lop3, 1 prmt of x, 0.5 half2, 0.5 fma, ..), so
// that issuing takes as long as multiplying: expected 35 %, 400 µs, where cuBLAS takes 195 µs with
// bf16 weights. From some 300 tokens on, dequantizing the weight for one call (int4_dequantize, 13
// µs here) and cuBLAS would be faster; int4_linear does not do that yet. None of this is measured.
#include "cuda/gemm/int4_gemm_kernel.h"

namespace pumice::cuda {

void int4_gemm_fp16(const Int4Product& product, const Int4Plan& plan, cudaStream_t stream) {
  launch_int4_gemm_16bit<__half>(product, plan, stream);
}

void int4_gemm(const Int4Product& product, const Int4Plan& plan, cudaStream_t stream) {
  switch (product.y_dtype) {
    case DType::kFloat16:
      return int4_gemm_fp16(product, plan, stream);
    case DType::kBFloat16:
      return int4_gemm_bf16(product, plan, stream);
    default:
      return int4_gemm_fp32(product, plan, stream);
  }
}

}  // namespace pumice::cuda
