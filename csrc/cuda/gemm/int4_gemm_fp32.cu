// The int4 product of fp32 activations, as the sum of two bf16: twice the bytes of x and twice the
// multiplications of int4_gemm_bf16.cu (on the general path three times), in two shapes of tiles.
#include "cuda/gemm/int4_gemm_kernel.h"

namespace pumice::cuda {

void int4_gemm_fp32(const Int4Product& product, const Int4Plan& plan, cudaStream_t stream) {
  using T = __nv_bfloat16;
  const bool general = int4_is_general(product.weight);
  if (plan.tile == Int4TileName::k8) {
    return general ? launch_int4_gemm<T, Int4SplitTile8, true>(product, plan, stream)
                   : launch_int4_gemm<T, Int4SplitTile8, false>(product, plan, stream);
  }
  return general ? launch_int4_gemm<T, Int4SplitTileCompact, true>(product, plan, stream)
                 : launch_int4_gemm<T, Int4SplitTileCompact, false>(product, plan, stream);
}

}  // namespace pumice::cuda
