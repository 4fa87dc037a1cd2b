// What a warp reads of a stage for its mma.sp, by the type of the values.
#pragma once

#include "cuda/gemm/float_fragment.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mma_sp.h"
#include "cuda/sparse/sparse24_slices.h"

namespace pumice::cuda {

// The B operand of 8 tokens from `token` on: four matrices of 8 tokens × 16 bytes side by side.
template <class Tile>
__device__ __forceinline__ void load_sparse24_tokens(uint32_t (&b)[4], const unsigned char* stage,
                                                     const WarpPlace<Tile>& place, int token,
                                                     int step) {
  const int lane = lane_index();
  const int chunk = place.warp_k * (kSparse24TokenBytes / 16) + 4 * step + lane / 8;
  ptx::ldmatrix_x4(b, stage + Tile::kTokenOffset +
                          (place.token + token + lane % 8) * Tile::kTokenRowBytes +
                          sparse24_chunk_place(lane % 8, chunk) * 16);
}

// Metadata of 16 rows and the four steps of a slice, in 16 bit. A chunk of a row has a word for
// each step. Lanes t = 0, 1 hold that of steps 0 and 1, lanes 2, 3 of steps 2 and 3: registers
// [step mod 2], which the selector step / 2 tells apart. An even lane wants the first 16 columns of
// a step.
template <class Tile>
__device__ __forceinline__ void load_sparse24_metadata_16bit(uint32_t (&e)[2],
                                                             const unsigned char* stage,
                                                             const WarpPlace<Tile>& place,
                                                             int row_tile) {
  constexpr uint32_t kLowHalves = 0x5410, kHighHalves = 0x7632;
  const int group = lane_index() / 4, t = lane_index() % 4;
  const unsigned char* rows =
      stage + Tile::kMetaOffset +
      (place.warp_k * Tile::kMetaChunkRows + place.row + row_tile * 16 + group) * 16 + t / 2 * 8;
  const auto first = *reinterpret_cast<const uint2*>(rows);
  const auto second = *reinterpret_cast<const uint2*>(rows + 8 * 16);
  const uint32_t halves = t % 2 == 0 ? kLowHalves : kHighHalves;
  e[0] = __byte_perm(first.x, second.x, halves);
  e[1] = __byte_perm(first.y, second.y, halves);
}

template <class T>
__device__ __forceinline__ void mma_sp_16bit(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[4], const uint32_t (&e)[2],
                                             int step) {
  if constexpr (std::is_same_v<T, __half>) {
    if (step / 2 == 0) {
      ptx::mma_sp_m16n8k32_f16<0>(d, a, b, e[step % 2]);
    } else {
      ptx::mma_sp_m16n8k32_f16<1>(d, a, b, e[step % 2]);
    }
  } else {
    if (step / 2 == 0) {
      ptx::mma_sp_m16n8k32_bf16<0>(d, a, b, e[step % 2]);
    } else {
      ptx::mma_sp_m16n8k32_bf16<1>(d, a, b, e[step % 2]);
    }
  }
}

// fp16 and bf16 values.
template <class T>
struct Sparse24Values16 {
  static constexpr Sparse24Kind kKind = Sparse24Kind::k16Bit;
  static constexpr bool kMetadataOfSlice = true;  // loaded for all steps at once
  using Sum = float;

  template <class Tile>
  static __device__ __forceinline__ void load_metadata(uint32_t (&e)[2], const unsigned char* stage,
                                                       const WarpPlace<Tile>& place, int row_tile,
                                                       int /*step*/) {
    load_sparse24_metadata_16bit(e, stage, place, row_tile);
  }
  static __device__ __forceinline__ void multiply(Sum (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[4], const uint32_t (&e)[2],
                                                  int step) {
    mma_sp_16bit<T>(d, a, b, e, step);
  }
};

// int8 values. Metadata: lane t gives a word of row g + 8·(t mod 2), the first or second 32 columns
// of the step. (Rows g and g + 8 share their banks: two passes.)
struct Sparse24ValuesInt8 {
  static constexpr Sparse24Kind kKind = Sparse24Kind::kInt8;
  static constexpr bool kMetadataOfSlice = false;
  using Sum = int32_t;

  // Of one step, into register step mod 2.
  template <class Tile>
  static __device__ __forceinline__ void load_metadata(uint32_t (&e)[2], const unsigned char* stage,
                                                       const WarpPlace<Tile>& place, int row_tile,
                                                       int step) {
    const int group = lane_index() / 4, t = lane_index() % 4;
    const int row = place.row + row_tile * 16 + t % 2 * 8 + group;
    const int chunk = 2 * place.warp_k + step / 2;
    e[step % 2] = *reinterpret_cast<const uint32_t*>(stage + Tile::kMetaOffset +
                                                     (chunk * Tile::kMetaChunkRows + row) * 16 +
                                                     (step % 2 * 2 + t / 2) * 4);
  }
  static __device__ __forceinline__ void multiply(Sum (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[4], const uint32_t (&e)[2],
                                                  int step) {
    ptx::mma_sp_m16n8k64_s8(d, a, b, e[step % 2]);
  }
};

}  // namespace pumice::cuda
