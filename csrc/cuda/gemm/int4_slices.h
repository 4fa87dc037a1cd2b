// How slices of the operands of int4_gemm get into shared memory.
//
// A stage of the ring holds, for one slice of K: the packed weights of the tile's rows, the tokens
// (one or two planes of 16 bit), and for each row and 32 values of K (or 128, where groups are that
// long) a scale and a zero point. The former come by cp.async; scales, which lie 2 bytes apart from
// row to row, pass through registers: loaded before a slice is multiplied, stored after it, so that
// their latency does not show.
#pragma once

#include "cuda/gemm/int4_fragment.h"
#include "cuda/gemm/int4_gemm.h"
#include "cuda/gemm/weight_tile.h"
#include "cuda/ptx/cp_async.h"

namespace pumice::cuda {

// Where chunk c (16 bytes) of a row lies in its row: such that the 8 rows of an ldmatrix, at one
// chunk, are in 8 different groups of 4 banks.
template <class Tile>
__device__ __forceinline__ int weight_chunk_place(int row, int c) {
  if constexpr (Tile::kWeightRowBytes == 64) return c ^ (row >> 1 & 3);
  return c ^ (row & 7);
}
// 8 lanes read 4 neighbouring chunks of each of 2 tokens at once.
__device__ __forceinline__ int token_chunk_place(int token, int c) { return c ^ (token & 1) << 2; }

// Numbers of a launch, worked out on the host: what a kernel's argument holds takes no register.
struct Int4Grid : TileOrder {
  int parts, slices;
  int m, n, words, token_stride;
  int groups, group_size;
  int terms_per_warp;  // scales of a row for 128 values of K: 1 or 4
  bool weights_aligned;
};

template <class Tile, bool kGeneral>
class Int4SliceLoader {
 public:
  __device__ Int4SliceLoader(const Int4Product& product, const Int4Grid& grid,
                             unsigned char* stages, int m0, int n0)
      : product_(product), grid_(grid), stages_(stages), m0_(m0), n0_(n0) {}

  // Starts the copies of a slice, and loads its scales into registers; commits a group. A slice
  // that does not exist becomes an empty group.
  __device__ __forceinline__ void start(int slice, int slices_end, int stage) {
    pending_ = slice < slices_end;
    if (pending_) {
      unsigned char* target = stages_ + stage * Tile::kStageBytes;
      if constexpr (!kGeneral) copy_weights(slice, target);
      copy_tokens(static_cast<const uint16_t*>(product_.tokens.high), slice, target);
      if constexpr (Tile::kPlanes == 2) {
        copy_tokens(static_cast<const uint16_t*>(product_.tokens.low), slice,
                    target + Tile::kPlaneBytes);
      }
      if constexpr (!kGeneral) load_terms(slice);
    }
    ptx::cp_async_commit();
  }

  // Stores the scales that start() loaded.
  __device__ __forceinline__ void finish(int stage) {
    if constexpr (kGeneral) return;
    if (!pending_) return;
    terms_.store(stages_ + stage * Tile::kStageBytes, terms_of_slice());
  }

 private:
  static constexpr int kWeightChunks = Tile::kWeightRowBytes / 16;
  static constexpr int kTokenChunks = Tile::kTokenRowBytes / 16;
  static constexpr int kWeightRowStep = Tile::kThreads / kWeightChunks;
  static constexpr int kTokenStep = Tile::kThreads / kTokenChunks;
  // A thread's rows all have their chunks at the same place.
  static_assert(kWeightRowStep % 8 == 0 && Tile::kRows % kWeightRowStep == 0);
  static_assert(kTokenStep % 2 == 0 && Tile::kTokens % kTokenStep == 0);

  __device__ __forceinline__ void copy_weights(int slice, unsigned char* target) const {
    const int row = static_cast<int>(threadIdx.x) / kWeightChunks;
    const int chunk = static_cast<int>(threadIdx.x) % kWeightChunks;
    const int word = slice * (Tile::kWeightRowBytes / 4) + chunk * 4;
    const int rows_left = grid_.n - n0_ - row;
    const uint32_t* source =
        product_.weight.qweight + static_cast<int64_t>(n0_ + row) * grid_.words + word;
    unsigned char* to =
        target + row * Tile::kWeightRowBytes + weight_chunk_place<Tile>(row, chunk) * 16;
#pragma unroll
    for (int i = 0; i < Tile::kRows / kWeightRowStep; ++i) {
      const bool row_exists = i * kWeightRowStep < rows_left;
      if (grid_.weights_aligned) {
        ptx::cp_async_16(to, source, row_exists && word < grid_.words);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          ptx::cp_async_4(to + 4 * j, source + j, row_exists && word + j < grid_.words);
        }
      }
      to += kWeightRowStep * Tile::kWeightRowBytes;
      source += static_cast<int64_t>(kWeightRowStep) * grid_.words;
    }
  }

  __device__ __forceinline__ void copy_tokens(const uint16_t* plane, int slice,
                                              unsigned char* target) const {
    const int token = static_cast<int>(threadIdx.x) / kTokenChunks;
    const int chunk = static_cast<int>(threadIdx.x) % kTokenChunks;
    const int element = slice * Tile::kSliceK + chunk * 8;
    const int tokens_left = grid_.m - m0_ - token;
    const int stride = grid_.token_stride;
    const uint16_t* source = plane + static_cast<int64_t>(m0_ + token) * stride + element;
    unsigned char* to = target + Tile::kTokenOffset + token * Tile::kTokenRowBytes +
                        token_chunk_place(token, chunk) * 16;
#pragma unroll
    for (int i = 0; i < Tile::kTokens / kTokenStep; ++i) {
      ptx::cp_async_16(to, source, element < stride && i * kTokenStep < tokens_left);
      to += kTokenStep * Tile::kTokenRowBytes;
      source += static_cast<int64_t>(kTokenStep) * stride;
    }
  }

  __device__ __forceinline__ int terms_of_slice() const {
    return Tile::kRows * Tile::kWarpsK * grid_.terms_per_warp;
  }

  // Term [k part][row]: 8 rows that a warp reads at once are neighbours.
  __device__ __forceinline__ void load_terms(int slice) {
    const IntnWeight& weight = product_.weight;
    const int values = kInt4WarpK / grid_.terms_per_warp;
#pragma unroll
    for (int i = 0; i < PendingTerms<Tile>::kCount; ++i) {
      const int term = static_cast<int>(threadIdx.x) + i * Tile::kThreads;
      if (term >= terms_of_slice()) break;
      const int64_t n = min(n0_ + term % Tile::kRows, grid_.n - 1);
      const int k = slice * Tile::kSliceK + term / Tile::kRows * values;
      const uint32_t group = static_cast<uint32_t>(k) / static_cast<uint32_t>(grid_.group_size);
      const int64_t at = n * grid_.groups + min(group, static_cast<uint32_t>(grid_.groups - 1));
      terms_.scales[i] = element_or_zero({weight.scales, weight.scale_dtype}, at);
      terms_.zeros[i] = weight.zero_kind == ZeroKind::kInteger
                            ? static_cast<const uint8_t*>(weight.zeros)[at]
                            : uint8_t{IntnLayout<4>::kMiddle};
    }
  }

  const Int4Product& product_;
  const Int4Grid& grid_;
  unsigned char* stages_;
  int m0_, n0_;
  bool pending_ = false;
  PendingTerms<Tile> terms_;
};

}  // namespace pumice::cuda
