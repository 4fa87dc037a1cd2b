// By the tile of the plan.
#pragma once

#include "cuda/sparse/sparse24_gemm_kernel.h"
#include "cuda/sparse/sparse24_int4_warp.h"
#include "cuda/sparse/sparse24_warp.h"

namespace pumice::cuda {

// Values: fp16, bf16 or int8 (sparse24_operands.h).
template <class Values>
void launch_sparse24(const Sparse24Product& product, const Sparse24Plan& plan, bool aligned,
                     cudaStream_t stream) {
  constexpr Sparse24Kind kKind = Values::kKind;
  const auto run = [&]<class Tile, bool kAligned>() {
    launch_sparse24_gemm<Sparse24Warp<Values, Tile>, Tile, kAligned>(product, plan, stream);
  };
  if (!aligned) {
    return plan.tile == Sparse24TileName::k8
               ? run.template operator()<Sparse24Tile8<kKind>, false>()
               : run.template operator()<Sparse24Tile64<kKind>, false>();
  }
  switch (plan.tile) {
    case Sparse24TileName::k8:
      return run.template operator()<Sparse24Tile8<kKind>, true>();
    case Sparse24TileName::k32:
      return run.template operator()<Sparse24Tile32<kKind>, true>();
    case Sparse24TileName::k128:
      return run.template operator()<Sparse24Tile128<kKind>, true>();
    case Sparse24TileName::k256:
      return run.template operator()<Sparse24Tile256<kKind>, true>();
    default:
      return run.template operator()<Sparse24Tile64<kKind>, true>();
  }
}

// int4 values with x of type T.
template <class T>
void launch_sparse24_int4(const Sparse24Product& product, const Sparse24Plan& plan, bool aligned,
                          cudaStream_t stream) {
  const auto run = [&]<class Tile, bool kAligned>() {
    launch_sparse24_gemm<Sparse24Int4Warp<T, Tile>, Tile, kAligned>(product, plan, stream);
  };
  if (!aligned) {
    return plan.tile == Sparse24TileName::k8 ? run.template operator()<Sparse24Int4Tile8, false>()
                                             : run.template operator()<Sparse24Int4Tile64, false>();
  }
  switch (plan.tile) {
    case Sparse24TileName::k8:
      return run.template operator()<Sparse24Int4Tile8, true>();
    case Sparse24TileName::k16:
      return run.template operator()<Sparse24Int4Tile16, true>();
    case Sparse24TileName::k32:
      return run.template operator()<Sparse24Int4Tile32, true>();
    case Sparse24TileName::k128:
      return run.template operator()<Sparse24Int4Tile128, true>();
    default:
      return run.template operator()<Sparse24Int4Tile64, true>();
  }
}

}  // namespace pumice::cuda
