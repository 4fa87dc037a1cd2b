// kernel: sparse24_gemm
//
// The 2:4 product of fp16; sparse24_gemm_kernel.h has the kernel, sparse24_tiles.h its tiles. The
// floors hold for bf16, too.
//
// Few tokens: N·K·(1 + 1/8) bytes of values and metadata, 1.78 times fewer than dense. 8192 × 8192:
// 75.5 MB, 17.6 µs at the 4.3 TB/s of an H200 (dense bf16 31.2 µs). Expected 90 % of that
// rate, 19.5 µs, at 8 tokens, where instructions take 15 % of the issue slots, shared memory is
// busy for 40 % of the time, and 110 KB of weights are under way on an SM; 85 % at 32 and 70 % at
// 64 tokens, where shared memory is busy for 70 and 95 %.
//
// Many tokens: M·N·K products at twice the dense rate of the tensor cores, of which mma.sync
// reaches some 62 % on a Hopper, where wgmma is needed for more: at M = N = K = 8192 the floor is
// 556 µs at 1979 TFLOPS, the expectation 50 % of that, 1.1 ms, where cuBLAS takes 1.6 ms for dense
// bf16 (700 TFLOPS). None of this is measured. Others found the sparse kernels of CUTLASS for sm_80
// at 350 TFLOPS on an H100 (cutlass#1335), but with mma.sp's unordered metadata, which the PTX ISA
// says may be much slower on some targets. Should ordered metadata not be faster, decompression (58
// µs here) and cuBLAS would be from some 1000 tokens on.
//
// A sm_90a collective (wgmma.sp, CUTLASS 3.x) would take the place of k128 and k256, by a row of
// its own in the table of tiles and a layout of the metadata made at load (CUTLASS wants its own).
// It is not here, for no GPU was at hand to choose its tiles on.
#include "cuda/sparse/sparse24_launch.h"

namespace pumice::cuda {

void sparse24_gemm_fp16(const Sparse24Product& product, const Sparse24Plan& plan, bool aligned,
                        cudaStream_t stream) {
  launch_sparse24<Sparse24Values16<__half>>(product, plan, aligned, stream);
}

}  // namespace pumice::cuda
