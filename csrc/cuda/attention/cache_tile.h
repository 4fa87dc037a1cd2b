// Tiles of bytes in shared memory, [tokens][head dim], as a cache of bytes is copied, and the
// operands of mma.sync made of them on the way to registers. A row of C bytes lies like one of C /
// 2 16-bit elements (shared_tile.h).
//
// ldmatrix moves pairs of bytes. As B of S = Q·Kᵀ it gives lane 4g + t the dims 4t .. 4t + 3 of key
// g, of each 16: they become k = 2t, 2t + 1 (dims 4t, 4t + 2) and k = 2t + 8, 2t + 9 (the others).
// A product does not care about the order of k, so long as Q has the same: separate_columns().
// Transposed, as B of O = P·V, it gives dims 2g and 2g + 1 of keys 2t and 2t + 1: the even dims of
// each 16 become the first 8 columns of the product, the odd ones the other 8, which the end of a
// row puts right (FlashMainloop::column).
#pragma once

#include "cuda/attention/cache_pairs.h"
#include "cuda/attention/shared_tile.h"

namespace pumice::cuda {

template <class T, CacheType kType, int kTileRows, int kTileColumns>
struct CacheTile {
  using Bytes = SharedTile<kTileRows, kTileColumns / 2>;
  static constexpr bool kSeparatesColumns = true;
  static constexpr bool kHasNan = kType == CacheType::kFloat8E4M3;

  // `columns` is a multiple of 16.
  template <int kThreads, class RowSource>
  static __device__ __forceinline__ void copy_found(unsigned char* tile, int thread, int columns,
                                                    RowSource&& row_source) {
    Bytes::template copy_found<kThreads>(tile, thread, columns / 2, row_source);
  }

  template <class, int kThreads>
  static __device__ __forceinline__ bool copied_non_finite(const unsigned char* tile, int thread) {
    if constexpr (!kHasNan) return false;
    return Bytes::template any_copied<kThreads>(
        tile, thread, [](uint32_t word) { return float8_nan_bits(word) != 0; });
  }
  template <class, int kThreads>
  static __device__ __forceinline__ void clear_non_finite(unsigned char* tile, int thread) {
    Bytes::template change_copied<kThreads>(
        tile, thread, [](uint32_t word) { return word & ~((float8_nan_bits(word) >> 7) * 0xffu); });
  }

  // As those of SharedTile, but for the order of what k and columns are.
  static __device__ __forceinline__ void load_b(uint32_t (&b)[2][2], const unsigned char* tile,
                                                int row, int k, int lane = lane_index()) {
    uint32_t words[2];
    ptx::ldmatrix_x2(words[0], words[1], tile + Bytes::beside(place(lane), row, k));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const BytePairs pairs = widen_bytes<T, kType>(words[i]);
      b[i][0] = pairs.even;
      b[i][1] = pairs.odd;
    }
  }
  static __device__ __forceinline__ void load_b_transposed(uint32_t (&b)[2][2],
                                                           const unsigned char* tile, int row,
                                                           int n, int lane = lane_index()) {
    uint32_t words[2];
    ptx::ldmatrix_x2_trans(words[0], words[1], tile + Bytes::beside(place(lane), row, n));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const BytePairs pairs = widen_bytes<T, kType>(words[i]);
      b[0][i] = pairs.even;
      b[1][i] = pairs.odd;
    }
  }

  // The two elements of row `row` that lane 4g + t has in column tile n of the product.
  static __device__ __forceinline__ uint32_t pair(const unsigned char* tile, int row, int n,
                                                  int t) {
    const auto word = *reinterpret_cast<const uint32_t*>(tile + Bytes::offset(row, n / 2) + t * 4);
    const BytePairs pairs = widen_bytes<T, kType>(word);
    return n % 2 == 0 ? pairs.even : pairs.odd;
  }

 private:
  static __device__ __forceinline__ int place(int lane) { return Bytes::offset(lane % 16, 0); }
};

// Brings each 16 columns of a tile of 16-bit elements into the order of a CacheTile's: those of
// even number, then the others. For kThreads threads, between two barriers.
template <class Tile, int kThreads>
__device__ __forceinline__ void separate_columns(unsigned char* tile, int thread) {
  constexpr int kPieces = Tile::kChunks / 2;
#pragma unroll 1
  for (int i = thread; i < Tile::kRows * kPieces; i += kThreads) {
    const int row = i / kPieces, piece = i % kPieces;
    auto* first = reinterpret_cast<uint4*>(tile + Tile::offset(row, 2 * piece));
    auto* second = reinterpret_cast<uint4*>(tile + Tile::offset(row, 2 * piece + 1));
    const uint4 a = *first, b = *second;
    constexpr uint32_t kLow = 0x5410, kHigh = 0x7632;
    *first = {__byte_perm(a.x, a.y, kLow), __byte_perm(a.z, a.w, kLow), __byte_perm(b.x, b.y, kLow),
              __byte_perm(b.z, b.w, kLow)};
    *second = {__byte_perm(a.x, a.y, kHigh), __byte_perm(a.z, a.w, kHigh),
               __byte_perm(b.x, b.y, kHigh), __byte_perm(b.z, b.w, kHigh)};
  }
}

}  // namespace pumice::cuda
