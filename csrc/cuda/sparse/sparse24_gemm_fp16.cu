// kernel: sparse24_gemm
//
// The 2:4 product of fp16; sparse24_gemm_kernel.h has the kernel, sparse24_tiles.h its tiles. The
// floors hold for bf16, too.
//
// Few tokens: N·K·(1 + 1/8) bytes of values and metadata, 1.78 times fewer than dense. 8192 × 8192:
// 75.5 MB, 15.7 µs at the 4.8 TB/s of an H200, 22.5 at the 3.35 of an H100 (dense 28.0 and 40.1).
// Up to 64 tokens instructions and shared memory leave room for that rate (sparse24_tiles.h).
// Expected 80 %, 90 % of what copies reach, at 8 tokens, with 110 KB of weights under way on an SM;
// 75 % at 32 and 65 % at 64 tokens, where shared memory is busy for 75 and 100 % of the time.
//
// Many tokens: M·N·K products at twice the dense rate of the tensor cores. M = N = K = 8192: 556 µs
// at 1979 TFLOPS, of which shared memory allows 46 % and mma.sync itself some 62 % on a Hopper,
// where wgmma is needed for more. Expected 42 %, 1.3 ms, where cuBLAS takes 1.6 ms for dense bf16
// (700 TFLOPS). None of this is measured. Others found the sparse kernels of CUTLASS for sm_80 at
// 350 TFLOPS on an H100 (cutlass#1335), but with mma.sp's unordered metadata, which the PTX ISA
// says may be much slower on some targets. Should ordered metadata not be faster, decompression and
// cuBLAS would be (sparse24_dense_from).
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
