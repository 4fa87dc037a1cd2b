// kernel: int4_gemm
//
// The int4 product of fp16 activations; int4_gemm_kernel.h has the kernel, int4_tiles.h its tiles.
//
// Floor at M ≤ 32, N = K = 8192, groups of 128: 33.5 MB of weights and 1 MB of scales at 4.3 TB/s,
// 8.0 µs (bf16 weights 31.2 µs). Expected 70 % of that rate at M ≤ 16 (11.5 µs): 64 KB of weights
// under way on an SM, where Little's law asks for 26 KB; widening takes 42 % of the issue slots,
// filling and draining the ring 1 µs. At M = 32 x takes as many bytes from L2 as the weights do
// from memory, twice over: some 16 µs.
//
// At M = N = K = 4096: 137 TFLOP = 139 µs at a Hopper's 989 TFLOPS; mma.sync reaches some 62 % of
// that, and here each has 2.2 other instructions beside it (widening 1.4, of the 4 slots there are
// for each): expected 35 %, 400 µs. From some hundred tokens on cuBLAS on dequantized weights would
// be faster; int4_linear does not do that yet.
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
