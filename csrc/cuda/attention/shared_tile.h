// Tiles of 16-bit elements in shared memory: [tokens][head dim], as attention's operands lie there.
//
// A row is cut into chunks of 16 bytes, the piece of cp.async and the row of an ldmatrix. Chunk c
// of row r lies at place c ^ swizzle(r), such that both the 8 chunks of a 128-byte piece of one row
// (as copied) and one chunk of 8 neighbouring rows (as loaded) are in 8 different groups of 4
// banks:
//
//   rows of a multiple of 128 bytes: all begin in the same bank, swizzle(r) = r mod 8
//   odd multiples of 64 bytes:       neighbours begin half way, swizzle(r) = r / 2 mod 4
//
// Fragments are those of mma.sync m16n8k16 (cuda/ptx/mma.h). A tile can be either operand, as it
// lies or transposed:
//
//   product          A                        B
//   S  = Q·Kᵀ        load_a(Q)                load_b(K)             [keys][dims] is [N][K]
//   O  = P·V         registers                load_b_transposed(V)  [keys][dims] is [K][N]
//   dK = dSᵀ·Q       load_a_transposed(dS)    load_b_transposed(Q)
#pragma once

#include "cuda/element.h"
#include "cuda/gemm/float_fragment.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"

namespace pumice::cuda {

template <int kTileRows, int kTileColumns>
struct SharedTile {
  static constexpr int kRows = kTileRows;
  static constexpr int kColumns = kTileColumns;
  static constexpr int kRowBytes = kColumns * 2;
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kBytes = kRows * kRowBytes;
  static_assert(kColumns % 32 == 0 && kRows % 8 == 0);

  static constexpr bool kWholeLines = kRowBytes % 128 == 0;

  // Where chunk `chunk` of row `row` lies, in bytes from the tile's start.
  static __device__ __forceinline__ int offset(int row, int chunk) {
    const int swizzle = kWholeLines ? row & 7 : row >> 1 & 3;
    return row * kRowBytes + (chunk ^ swizzle) * 16;
  }

  // Starts the copies of the tile by kThreads threads, of which this one is number `thread`; the
  // caller commits. Row r begins at row_source(r), a multiple of 16 bytes; rows from `rows` on and
  // columns from `columns` (a multiple of 8) on become zero, and no source is asked for them.
  template <int kThreads, class RowSource>
  static __device__ __forceinline__ void copy(unsigned char* tile, int thread, int rows,
                                              int columns, RowSource&& row_source) {
    constexpr int kLanes = kWholeLines ? 8 : 4;  // neighbours on one row
    constexpr int kStep = kThreads / kLanes;  // a multiple of 8: a thread's swizzle is one number
    constexpr int kSteps = (kRows + kStep - 1) / kStep;
    static_assert(kThreads % (8 * kLanes) == 0);
    const int row = thread / kLanes, chunk = thread % kLanes;
    unsigned char* to = tile + offset(row, chunk);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (kRows % kStep != 0 && row + i * kStep >= kRows) break;
      const bool exists = row + i * kStep < rows;
      const uint16_t* from =
          exists ? static_cast<const uint16_t*>(row_source(row + i * kStep)) + chunk * 8 : nullptr;
#pragma unroll
      for (int j = 0; j < kChunks / kLanes; ++j) {
        ptx::cp_async_16(to + i * kStep * kRowBytes + j * kLanes * 16, from + j * kLanes * 8,
                         exists && (chunk + j * kLanes) * 8 < columns);
      }
    }
  }

  // Whether one of the elements that this thread copied by copy<kThreads>(), and has waited for, is
  // an infinity or NaN of the 16-bit type.
  template <class T, int kThreads>
  static __device__ __forceinline__ bool copied_non_finite(const unsigned char* tile, int thread) {
    constexpr int kLanes = kWholeLines ? 8 : 4, kStep = kThreads / kLanes;
    constexpr uint32_t kExponent = std::is_same_v<T, __half> ? 0x7c00u : 0x7f80u;
    const int row = thread / kLanes, chunk = thread % kLanes;
    bool found = false;
    for (int i = 0; row + i * kStep < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kChunks / kLanes; ++j) {
        const uint4 words = *reinterpret_cast<const uint4*>(
            tile + offset(row, chunk) + i * kStep * kRowBytes + j * kLanes * 16);
        for (const uint32_t word : {words.x, words.y, words.z, words.w}) {
          found |= (word & kExponent) == kExponent || (word >> 16 & kExponent) == kExponent;
        }
      }
    }
    return found;
  }

  // A: 16 rows from `row`, 16 columns (along K) from 16·k.
  static __device__ __forceinline__ void load_a(uint32_t (&a)[4], const unsigned char* tile,
                                                int row, int k) {
    const int lane = lane_index();
    ptx::ldmatrix_x4(a, tile + offset(row + lane % 16, 2 * k + lane / 16));
  }

  // Aᵀ: 16 columns from 16·m are the operand's rows, 16 rows from `k` run along K.
  static __device__ __forceinline__ void load_a_transposed(uint32_t (&a)[4],
                                                           const unsigned char* tile, int m,
                                                           int k) {
    const int lane = lane_index();
    ptx::ldmatrix_x4_trans(a, tile + offset(k + lane / 16 * 8 + lane % 8, 2 * m + (lane / 8 & 1)));
  }

  // Two B: rows row .. row + 7 and row + 8 .. row + 15 are columns of the product; K as in load_a.
  static __device__ __forceinline__ void load_b(uint32_t (&b)[2][2], const unsigned char* tile,
                                                int row, int k) {
    const int lane = lane_index();
    ptx::ldmatrix_x4(b[0][0], b[0][1], b[1][0], b[1][1],
                     tile + offset(row + lane / 16 * 8 + lane % 8, 2 * k + (lane / 8 & 1)));
  }

  // Two B, transposed: 16 rows from `row` run along K, columns 16·n .. +7 and 16·n + 8 .. +15 are
  // those of the product.
  static __device__ __forceinline__ void load_b_transposed(uint32_t (&b)[2][2],
                                                           const unsigned char* tile, int row,
                                                           int n) {
    const int lane = lane_index();
    ptx::ldmatrix_x4_trans(b[0][0], b[0][1], b[1][0], b[1][1],
                           tile + offset(row + lane % 16, 2 * n + lane / 16));
  }
};

// Two neighbouring fp32 numbers as one register of a 16-bit operand, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    return bits_as<uint32_t>(__floats2half2_rn(low, high));
  } else {
    return bits_as<uint32_t>(__floats2bfloat162_rn(low, high));
  }
}

}  // namespace pumice::cuda
