// The outlier columns of LLM.int8(), added to a tile of y that is still in registers.
//
// A block ORs the partial masks of the quantization once (from L2, while its first tiles arrive),
// and lists the columns in order. Then, 16 columns at a time, the block gathers residuals of x and
// columns of the weight into shared memory in 16 bit, and its warps multiply them as they multiply
// everything else. Memory is bounded however many outliers there are: the list is made in pieces.
//
// Cost: one sector (32 bytes) from L2 for each row of the tile and column. At 64 bytes a clock, 16
// columns of a 128 × 256 tile take 16 · 384 · 32 / 64 = 3,000 clocks, 6 % of the tile's 50,000 at
// K = 4096. Without outliers: the masks, 67 KB a block or 1,000 clocks at K = 4096, once.
#pragma once

#include "common/int8_numerics.h"
#include "cuda/element.h"
#include "cuda/gemm/float_fragment.h"
#include "cuda/gemm/int8_gemm.h"
#include "cuda/gemm/int8_tiles.h"
#include "cuda/gemm/int8_widen.h"
#include "cuda/ptx/ldmatrix.h"

namespace pumice::cuda {

// A piece of the list of outlier columns: those of the mask words from first_word up to next_word.
struct OutlierList {
  int count, first_word, next_word, unused;
};

// Pieces of shared memory. Everything about outliers is kept there: the main loop of the product
// needs all registers.
struct OutlierShared {
  unsigned char* residual;      // [kBlockM] rows of 16 elements
  unsigned char* residual_low;  // [kBlockM], fp32 x only
  unsigned char* weight;        // [kBlockN]
  int32_t* columns;             // [kOutlierListCapacity]
  OutlierList* list;
  uint32_t* mask;
};

// Rows of 32 bytes: two 16-byte halves, changed round in every second four rows, so that the 8 rows
// of an ldmatrix lie in different banks.
__device__ __forceinline__ int half_row_offset(int row, int half) {
  return row * 32 + ((half ^ (row >> 2)) & 1) * 16;
}

// Lists the outlier columns in ascending order from a mask word on: as many as the list can hold,
// whole groups of words at a time, by one warp. Called by the whole block, like all that follows.
__device__ __forceinline__ void list_outliers(const OutlierShared& shared, int words,
                                              int first_word, int thread) {
  constexpr int kWordsAtOnce = kOutlierListCapacity / 32;
  static_assert(kWordsAtOnce <= kWarpSize);
  __syncthreads();  // the list may still be in use
  if (thread < kWarpSize) {
    const int lane = thread;
    int listed = 0, first = first_word;
    for (; first < words; first += kWordsAtOnce) {
      const int word = first + lane;
      uint32_t bits = lane < kWordsAtOnce && word < words ? shared.mask[word] : 0;
      int end = __popc(bits);  // of this lane's columns, after the sum over the lanes before
#pragma unroll
      for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const int before = __shfl_up_sync(kFullWarp, end, offset);
        if (lane >= offset) end += before;
      }
      const int found = __shfl_sync(kFullWarp, end, kWarpSize - 1);
      if (listed + found > kOutlierListCapacity) break;
      int at = listed + end - __popc(bits);
      for (; bits != 0; bits &= bits - 1) {
        shared.columns[at++] = word * 32 + __ffs(static_cast<int>(bits)) - 1;
      }
      listed += found;
    }
    if (lane == 0) *shared.list = {listed, first_word, first, 0};
  }
  __syncthreads();
}

// ORs the partial masks, and lists the first columns: all, unless there are very many.
template <int kThreads>
__device__ __forceinline__ void collect_outliers(const Int8Outliers& outliers,
                                                 const OutlierShared& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int word = thread; word < outliers.mask_words; word += kThreads) shared.mask[word] = 0;
  __syncthreads();
  const uint4* partial = reinterpret_cast<const uint4*>(outliers.partial_masks);
  const int vectors = outliers.mask_words / 4;
  const int total = outliers.masks * vectors;
#pragma unroll 4
  for (int i = thread; i < total; i += kThreads) {
    const uint4 found = partial[i];
    if ((found.x | found.y | found.z | found.w) == 0) continue;
    uint32_t* target = shared.mask + i % vectors * 4;
    atomicOr(target, found.x);
    atomicOr(target + 1, found.y);
    atomicOr(target + 2, found.z);
    atomicOr(target + 3, found.w);
  }
  list_outliers(shared, outliers.mask_words, 0, thread);
}

__device__ __forceinline__ float residual_of(float x, float scale, float inverse_scale,
                                             const Int8Outliers& outliers) {
  if (is_outlier(x, outliers.threshold)) return x;
  if (outliers.per_element) return 0.0f;
  return x - scale * static_cast<float>(int8_round(x, inverse_scale));
}

// Residuals of 8 of the 16 columns in one row: half of a row of shared memory.
template <class T>
__device__ __forceinline__ void gather_residuals(const Int8Outliers& outliers,
                                                 const OutlierShared& shared, const T* x_row,
                                                 float scale, float inverse_scale,
                                                 const int32_t* columns, int valid, int offset) {
  T x[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = i < valid ? x_row[columns[i]] : T(0.0f);
  uint32_t bits[4] = {}, low_bits[4] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float r = i < valid ? residual_of(to_float(x[i]), scale, inverse_scale, outliers) : 0.0f;
    if constexpr (kIsSplit<T>) {
      const SplitBits split = split_bits(r);
      bits[i / 2] |= split.high << (i % 2 * 16);
      low_bits[i / 2] |= split.low << (i % 2 * 16);
    } else {
      bits[i / 2] |= bits_of<T>(r) << (i % 2 * 16);
    }
  }
  *reinterpret_cast<uint4*>(shared.residual + offset) = {bits[0], bits[1], bits[2], bits[3]};
  if constexpr (kIsSplit<T>) {
    *reinterpret_cast<uint4*>(shared.residual_low + offset) = {low_bits[0], low_bits[1],
                                                               low_bits[2], low_bits[3]};
  }
}

template <class T>
__device__ __forceinline__ void gather_weights(const OutlierShared& shared,
                                               const int8_t* weight_row, const int32_t* columns,
                                               int valid, int offset) {
  uint32_t bytes[2] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t byte = i < valid ? static_cast<uint8_t>(weight_row[columns[i]]) : 0;
    bytes[i / 4] |= byte << (i % 4 * 8);
  }
  uint4 words;
  widen_int8x4<Multiplicand<T>>(bytes[0], words.x, words.y);
  widen_int8x4<Multiplicand<T>>(bytes[1], words.z, words.w);
  *reinterpret_cast<uint4*>(shared.weight + offset) = words;
}

// Up to 16 columns of both operands. Rows beyond the matrices become zeros.
template <class T, class Tile>
__device__ __forceinline__ void gather_step(const Int8Product& product, const Int8Tokens& tokens,
                                            const Int8Outliers& outliers,
                                            const OutlierShared& shared, int64_t m0, int64_t n0,
                                            const int32_t* columns, int count, int thread) {
#pragma unroll 1
  for (int item = thread; item < 2 * Tile::kBlockM; item += Tile::kThreads) {
    const int row = item / 2, half = item % 2;
    const bool inside = m0 + row < product.m;
    const int64_t m = inside ? m0 + row : 0;
    gather_residuals(outliers, shared, static_cast<const T*>(outliers.x) + m * product.k,
                     tokens.scale[m], outliers.inverse_scale[m], columns + half * 8,
                     inside ? count - half * 8 : 0, half_row_offset(row, half));
  }
#pragma unroll 1
  for (int item = thread; item < 2 * Tile::kBlockN; item += Tile::kThreads) {
    const int row = item / 2, half = item % 2;
    const bool inside = n0 + row < product.n;
    const int64_t n = inside ? n0 + row : 0;
    gather_weights<T>(shared, product.weight + n * product.k, columns + half * 8,
                      inside ? count - half * 8 : 0, half_row_offset(row, half));
  }
}

// out += residuals · weightsᵀ, for this warp's part of the tile.
template <class T, class Tile>
__device__ __forceinline__ void multiply_step(float (&out)[Tile::kWarpM / 16][Tile::kWarpN / 8][4],
                                              const OutlierShared& shared, int lane, int warp_row,
                                              int warp_column) {
  uint32_t b[Tile::kWarpN / 8][2];
#pragma unroll
  for (int j = 0; j < Tile::kWarpN / 8; j += 2) {
    const int row = warp_column + j * 8 + lane / 16 * 8 + lane % 8;
    ptx::ldmatrix_x4(b[j][0], b[j][1], b[j + 1][0], b[j + 1][1],
                     shared.weight + half_row_offset(row, lane / 8 % 2));
  }
#pragma unroll
  for (int i = 0; i < Tile::kWarpM / 16; ++i) {
    const int offset = half_row_offset(warp_row + i * 16 + lane % 16, lane / 16);
    uint32_t a[4];
    ptx::ldmatrix_x4(a, shared.residual + offset);
#pragma unroll
    for (int j = 0; j < Tile::kWarpN / 8; ++j) mma_16bit<T>(out[i][j], a, b[j]);
    if constexpr (kIsSplit<T>) {
      ptx::ldmatrix_x4(a, shared.residual_low + offset);
#pragma unroll
      for (int j = 0; j < Tile::kWarpN / 8; ++j) mma_16bit<T>(out[i][j], a, b[j]);
    }
  }
}

// All outlier columns, for the tile of y at (m0, n0).
template <class T, class Tile>
__device__ __forceinline__ void add_outliers(float (&out)[Tile::kWarpM / 16][Tile::kWarpN / 8][4],
                                             const Int8Product& product, const Int8Tokens& tokens,
                                             const Int8Outliers& outliers,
                                             const OutlierShared& shared, int64_t m0, int64_t n0,
                                             int thread, int warp_row, int warp_column) {
  if (shared.list->first_word != 0) list_outliers(shared, outliers.mask_words, 0, thread);
  while (true) {
    const int count = shared.list->count;
#pragma unroll 1
    for (int first = 0; first < count; first += kOutlierStep) {
      __syncthreads();  // the operands of the step before are read
      gather_step<T, Tile>(product, tokens, outliers, shared, m0, n0, shared.columns + first,
                           count - first, thread);
      __syncthreads();
      multiply_step<T, Tile>(out, shared, thread % kWarpSize, warp_row, warp_column);
    }
    const int next_word = shared.list->next_word;
    if (next_word >= outliers.mask_words) return;
    list_outliers(shared, outliers.mask_words, next_word, thread);
  }
}

}  // namespace pumice::cuda
