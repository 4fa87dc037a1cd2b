// The main loop of a warp for values of 16 and 8 bits.
//
// While one step of K is multiplied, the operands of the next are read: A (and metadata of int8)
// into a second set of registers, B token tile by token tile into the same, as it is used up. So
// two warps on each scheduler, which is all that the registers of the largest tile leave room for,
// keep its tensor core busy; but for B of a slice's first step, which comes after the last of the
// slice before.
#pragma once

#include "cuda/sparse/sparse24_operands.h"

namespace pumice::cuda {

template <class Values, class Tile>
class Sparse24Warp {
 public:
  using Sum = typename Values::Sum;
  static constexpr int kRowTiles = Tile::kRowTiles, kTokenTiles = Tile::kTokenTiles;

  __device__ Sparse24Warp(const Sparse24Product& /*product*/, const Sparse24Grid& /*grid*/) {}

  // The slices of [begin, end), of which the loader has started the first kStages - 1.
  template <class Loader>
  __device__ __forceinline__ void multiply(Loader& loader, const unsigned char* stages, int begin,
                                           int end) {
    uint32_t a[2][kRowTiles][4], b[kTokenTiles][4];
    uint32_t e[kRowTiles][2];
    int stage = 0;
    ptx::cp_async_wait<Tile::kStages - 2>();
    __syncthreads();
    load_values(a[0], e, stages, 0);
    load_first_step(b, e, stages);
#pragma unroll 1
    for (int slice = begin; slice < end; ++slice) {
      const bool more = slice + 1 < end;
      // The stage before this one is free: all warps have passed the barrier after reading it.
      loader.start(stage == 0 ? Tile::kStages - 1 : stage - 1);
#pragma unroll
      for (int step = 0; step < kSparse24Steps; ++step) {
        const bool last_step = step == kSparse24Steps - 1;
        if (last_step) {
          stage = stage == Tile::kStages - 1 ? 0 : stage + 1;
          if (more) {
            ptx::cp_async_wait<Tile::kStages - 2>();
            __syncthreads();
            load_values(a[0], e, stages + stage * Tile::kStageBytes, 0);
          }
        } else {
          load_values(a[(step + 1) % 2], e, stages + stage * Tile::kStageBytes, step + 1);
        }
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
            Values::multiply(sum_[r][j], a[step % 2][r], b[j], e[r], step);
          }
          if (!last_step) {
            load_sparse24_tokens(b[j], stages + stage * Tile::kStageBytes, place_, 8 * j, step + 1);
          }
        }
        if (last_step && more) load_first_step(b, e, stages + stage * Tile::kStageBytes);
      }
    }
  }

  __device__ __forceinline__ void store_sums(Sum* sums) const {
    store_warp_sums<Tile>(sums, sum_, place_);
  }

 private:
  // Four matrices of 8 rows × 16 bytes: top left, bottom left, top right, bottom right.
  __device__ __forceinline__ void load_values(uint32_t (&a)[kRowTiles][4],
                                              uint32_t (&e)[kRowTiles][2],
                                              const unsigned char* stage, int step) const {
    const int lane = lane_index();
    const int chunk = place_.warp_k * (Tile::Format::kValueBytes / 16) + 2 * step + lane / 16;
    const unsigned char* rows = stage + (place_.row + lane % 16) * Tile::kValueRowBytes +
                                sparse24_chunk_place(lane % 8, chunk) * 16;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      ptx::ldmatrix_x4(a[r], rows + r * 16 * Tile::kValueRowBytes);
      if constexpr (!Values::kMetadataOfSlice) {
        Values::load_metadata(e[r], stage, place_, r, step);
      }
    }
  }

  // What load_values leaves out, when nothing of the slice before is needed any more.
  __device__ __forceinline__ void load_first_step(uint32_t (&b)[kTokenTiles][4],
                                                  uint32_t (&e)[kRowTiles][2],
                                                  const unsigned char* stage) const {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      if constexpr (Values::kMetadataOfSlice) {
        Values::load_metadata(e[r], stage, place_, r, 0);
      }
    }
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) load_sparse24_tokens(b[j], stage, place_, 8 * j, 0);
  }

  WarpPlace<Tile> place_;
  Sum sum_[kRowTiles][kTokenTiles][4] = {};
};

}  // namespace pumice::cuda
