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

// A 16-bit element that is neither an infinity nor NaN.
template <class T>
__device__ __forceinline__ bool is_finite(uint32_t bits) {
  constexpr uint32_t kExponent = std::is_same_v<T, __half> ? 0x7c00u : 0x7f80u;
  return (bits & kExponent) != kExponent;
}

// Of a pair, what is finite; zero for what is not.
template <class T>
__device__ __forceinline__ uint32_t finite_or_zero(uint32_t pair) {
  return (is_finite<T>(pair) ? pair & 0xffffu : 0u) |
         (is_finite<T>(pair >> 16) ? pair & 0xffff0000u : 0u);
}

template <int kTileRows, int kTileColumns>
struct SharedTile {
  static constexpr int kRows = kTileRows;
  static constexpr int kColumns = kTileColumns;
  static constexpr int kRowBytes = kColumns * 2;
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kBytes = kRows * kRowBytes;
  static_assert(kColumns % 32 == 0 && kRows % 8 == 0);

  static constexpr bool kWholeLines = kRowBytes % 128 == 0;
  static constexpr bool kSeparatesColumns = false;  // as cache_tile.h does

  // Where chunk `chunk` of row `row` lies, in bytes from the tile's start.
  static __device__ __forceinline__ int offset(int row, int chunk) {
    const int swizzle = kWholeLines ? row & 7 : row >> 1 & 3;
    return row * kRowBytes + (chunk ^ swizzle) * 16;
  }

  // How kThreads threads share a tile: each has a column of chunks of every kStep-th row.
  template <int kThreads>
  struct Share {
    static constexpr int kLanes = kWholeLines ? 8 : 4;  // neighbours on one row
    static constexpr int kStep = kThreads / kLanes;
    static constexpr int kSteps = (kRows + kStep - 1) / kStep;
    static constexpr int kChunksOfRow = kChunks / kLanes;
    static_assert(kThreads % (8 * kLanes) == 0, "a thread's swizzle is one number");
    int row, chunk;
    explicit __device__ __forceinline__ Share(int thread)
        : row(thread / kLanes), chunk(thread % kLanes) {}
    static __device__ __forceinline__ int beside(int i, int j) {
      return i * kStep * kRowBytes + j * kLanes * 16;
    }
  };

  // Starts the copies of the tile by kThreads threads, of which this one is number `thread`; the
  // caller commits. Row r begins at row_source(r), a multiple of 16 bytes; rows from `rows` on and
  // columns from `columns` (a multiple of 8) on become zero, and nothing is read for them.
  template <int kThreads, class RowSource>
  static __device__ __forceinline__ void copy(unsigned char* tile, int thread, int rows,
                                              int columns, RowSource&& row_source) {
    const Share<kThreads> mine(thread);
    copy_rows(mine, tile, rows, columns, [&](int i) {
      const void* row = row_source(mine.row + i * mine.kStep);
      return static_cast<const unsigned char*>(row);
    });
  }

  // The same where row r begins at first + r · stride (bytes): an addition a row.
  template <int kThreads>
  static __device__ __forceinline__ void copy_strided(unsigned char* tile, int thread, int rows,
                                                      int columns, const unsigned char* first,
                                                      int64_t stride) {
    const Share<kThreads> mine(thread);
    const unsigned char* next = first + mine.row * stride;
    copy_rows(mine, tile, rows, columns, [&](int) {
      const unsigned char* row = next;
      next += mine.kStep * stride;
      return row;
    });
  }

  // The same where row r begins at row_source(r), or, where that is null, becomes zero.
  template <int kThreads, class RowSource>
  static __device__ __forceinline__ void copy_found(unsigned char* tile, int thread, int columns,
                                                    RowSource&& row_source) {
    const Share<kThreads> mine(thread);
    copy_rows<true>(mine, tile, kRows, columns,
                    [&](int i) { return row_source(mine.row + i * mine.kStep); });
  }

  // Whether a predicate holds for one of the words that this thread copied by copy<kThreads>(), and
  // has waited for.
  template <int kThreads, class Predicate>
  static __device__ __forceinline__ bool any_copied(const unsigned char* tile, int thread,
                                                    Predicate&& predicate) {
    using Mine = Share<kThreads>;
    const Mine mine(thread);
    const unsigned char* first = tile + offset(mine.row, mine.chunk);
    bool found = false;
#pragma unroll 1
    for (int i = 0; i < Mine::kSteps && mine.row + i * Mine::kStep < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < Mine::kChunksOfRow; ++j) {
        const uint4 words = *reinterpret_cast<const uint4*>(first + mine.beside(i, j));
        for (const uint32_t word : {words.x, words.y, words.z, words.w}) found |= predicate(word);
      }
    }
    return found;
  }

  // Makes change(word) of each of them.
  template <int kThreads, class Change>
  static __device__ __forceinline__ void change_copied(unsigned char* tile, int thread,
                                                       Change&& change) {
    using Mine = Share<kThreads>;
    const Mine mine(thread);
    unsigned char* first = tile + offset(mine.row, mine.chunk);
#pragma unroll 1
    for (int i = 0; i < Mine::kSteps && mine.row + i * Mine::kStep < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < Mine::kChunksOfRow; ++j) {
        auto* words = reinterpret_cast<uint4*>(first + mine.beside(i, j));
        const uint4 w = *words;
        *words = {change(w.x), change(w.y), change(w.z), change(w.w)};
      }
    }
  }

  // The same for elements that are an infinity or NaN of the 16-bit type: whether there are any,
  // and zeros in their place.
  template <class T, int kThreads>
  static __device__ __forceinline__ bool copied_non_finite(const unsigned char* tile, int thread) {
    return any_copied<kThreads>(
        tile, thread, [](uint32_t w) { return !is_finite<T>(w) || !is_finite<T>(w >> 16); });
  }
  template <class T, int kThreads>
  static __device__ __forceinline__ void clear_non_finite(unsigned char* tile, int thread) {
    change_copied<kThreads>(tile, thread, [](uint32_t w) { return finite_or_zero<T>(w); });
  }

  // What lies `rows` rows (a multiple of 8) below and `chunks` chunks (an even number) beside the
  // place of row r, chunk c < 2. Both are known when the program is compiled, or the same for all
  // lanes: the bits that the swizzle takes from r do not change, and those of the chunk pass
  // through.
  static __device__ __forceinline__ int beside(int place, int rows, int chunks) {
    constexpr int kMixed = kWholeLines ? 7 : 3;
    return (place ^ (chunks & kMixed) * 16) + (chunks & ~kMixed) * 16 + rows * kRowBytes;
  }
  // The place of a lane's row in the first four matrices of a tile: in the order of A's registers
  // (top left, bottom left, top right, bottom right), or with the middle ones exchanged.
  static __device__ __forceinline__ int down_first(int lane) {
    return offset(lane % 16, lane / 16);
  }
  static __device__ __forceinline__ int across_first(int lane) {
    return offset(lane / 16 * 8 + lane % 8, lane / 8 & 1);
  }

  // A: 16 rows from `row`, 16 columns (along K) from 16·k.
  static __device__ __forceinline__ void load_a(uint32_t (&a)[4], const unsigned char* tile,
                                                int row, int k, int lane = lane_index()) {
    ptx::ldmatrix_x4(a, tile + beside(down_first(lane), row, 2 * k));
  }

  // Aᵀ: 16 columns from 16·m are the operand's rows, 16 rows from `k` run along K.
  static __device__ __forceinline__ void load_a_transposed(uint32_t (&a)[4],
                                                           const unsigned char* tile, int m, int k,
                                                           int lane = lane_index()) {
    ptx::ldmatrix_x4_trans(a, tile + beside(across_first(lane), k, 2 * m));
  }

  // Two B: rows row .. row + 7 and row + 8 .. row + 15 are columns of the product; K as in load_a.
  static __device__ __forceinline__ void load_b(uint32_t (&b)[2][2], const unsigned char* tile,
                                                int row, int k, int lane = lane_index()) {
    ptx::ldmatrix_x4(b[0][0], b[0][1], b[1][0], b[1][1],
                     tile + beside(across_first(lane), row, 2 * k));
  }

  // Two B, transposed: 16 rows from `row` run along K, columns 16·n .. +7 and 16·n + 8 .. +15 are
  // those of the product.
  static __device__ __forceinline__ void load_b_transposed(uint32_t (&b)[2][2],
                                                           const unsigned char* tile, int row,
                                                           int n, int lane = lane_index()) {
    ptx::ldmatrix_x4_trans(b[0][0], b[0][1], b[1][0], b[1][1],
                           tile + beside(down_first(lane), row, 2 * n));
  }

  // The two elements of row `row` that lane 4g + t has in column tile n of a product with the tile
  // as B transposed.
  static __device__ __forceinline__ uint32_t pair(const unsigned char* tile, int row, int n,
                                                  int t) {
    return *reinterpret_cast<const uint32_t*>(tile + offset(row, n) + t * 4);
  }

 private:
  template <bool kMayMiss = false, class Mine, class RowOfStep>
  static __device__ __forceinline__ void copy_rows(const Mine& mine, unsigned char* tile, int rows,
                                                   int columns, RowOfStep&& row_of_step) {
    unsigned char* to = tile + offset(mine.row, mine.chunk);
#pragma unroll
    for (int i = 0; i < Mine::kSteps; ++i) {
      if (kRows % Mine::kStep != 0 && mine.row + i * Mine::kStep >= kRows) break;
      const unsigned char* row = row_of_step(i);
      const bool exists = kMayMiss ? row != nullptr : mine.row + i * Mine::kStep < rows;
      const unsigned char* from = row + mine.chunk * 16;
#pragma unroll
      for (int j = 0; j < Mine::kChunksOfRow; ++j) {
        ptx::cp_async_16(to + mine.beside(i, j), from + j * Mine::kLanes * 16,
                         exists && (mine.chunk + j * Mine::kLanes) * 8 < columns);
      }
    }
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
