// How slices of the operands of the 2:4 products get into shared memory.
//
// A stage of the ring holds, for one slice of K:
//   values    16 and 8 bit: [row][16-byte chunk], for ldmatrix; int4: [chunk][row]
//   metadata  [chunk][row], so that the rows that a warp reads at once are neighbours
//   x         [token][chunk]
// all without bank conflicts (sparse24_tiles.h).
// The canonical layout of the metadata is read as it lies: a row's words are 32 columns each, which
// is what a lane of mma.sp gives (int8) or half of what two lanes give (16 bit).
//
// Beyond the ends of K and of the tokens are zeros, and nothing but zeros meets what the metadata
// says there: it is that of the last word, for mma.sp defines no zero.
//
// int4 scales lie 2 bytes apart from row to row and pass through registers: loaded before a slice
// is multiplied, stored after it, so that their latency does not show.
#pragma once

#include "cuda/element.h"
#include "cuda/gemm/unaligned.h"
#include "cuda/gemm/weight_tile.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/sparse/sparse24_gemm.h"

namespace pumice::cuda {

// Numbers of a launch, worked out on the host: what a kernel's argument holds takes no register.
struct Sparse24Grid : TileOrder {
  int parts, slices;
  int m, n;
  int value_bytes, meta_bytes, token_bytes;  // of a row
  bool meta_aligned;                         // to 16 bytes

  // int4. A group has group_chunks chunks of kSparse24ChunkK columns; a row has 1 << terms_shift
  // scales for a warp's slice, 1 or 2.
  int groups, group_chunks, terms_shift, terms_of_slice;
  uint32_t group_reciprocal;  // 2^32 / group_chunks, rounded up

  // chunk / group_chunks, exactly: both are below 2^16 (kSparse24MaxInt4K).
  __device__ __forceinline__ int group_of(int chunk) const {
    return group_chunks == 1
               ? chunk
               : static_cast<int>(__umulhi(static_cast<uint32_t>(chunk), group_reciprocal));
  }
};

// A thread's part of copying slices of kRows rows, kRowBytes of each, in chunks of 16 bytes:
// [row][chunk], or [chunk][row].
template <int kRows, int kRowBytes, int kThreads, bool kRowMajor>
class Sparse24Rows {
 public:
  __device__ __forceinline__ Sparse24Rows(const unsigned char* matrix, int row_bytes, int first_row,
                                          int rows, int first_slice)
      : row_bytes_(row_bytes),
        rows_left_(rows - first_row - row()),
        bytes_left_(row_bytes - first_slice * kRowBytes - chunk() * 16) {
    source_ = matrix + static_cast<int64_t>(first_row + row()) * row_bytes +
              first_slice * kRowBytes + chunk() * 16;
  }

  // The next slice. Zeros where there is nothing.
  template <bool kAligned>
  __device__ __forceinline__ void copy(unsigned char* target) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (kRows % kStep != 0 && row() + i * kStep >= kRows) break;
      const int valid = i * kStep < rows_left_ ? bytes_left_ : 0;
      const unsigned char* source = source_ + static_cast<int64_t>(i * kStep) * row_bytes_;
      if constexpr (kAligned) {
        ptx::cp_async_16(target + place(row() + i * kStep), source, valid > 0);
      } else {
        *reinterpret_cast<uint4*>(target + place(row() + i * kStep)) =
            load_unaligned_16(source, valid);
      }
    }
    source_ += kRowBytes;
    bytes_left_ -= kRowBytes;
  }

 private:
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kStep = kThreads / kChunks;
  static constexpr int kCopies = (kRows + kStep - 1) / kStep;
  static_assert(kThreads % kChunks == 0);

  static __device__ __forceinline__ int row() { return static_cast<int>(threadIdx.x) / kChunks; }
  static __device__ __forceinline__ int chunk() { return static_cast<int>(threadIdx.x) % kChunks; }
  static __device__ __forceinline__ int place(int row) {
    if constexpr (kRowMajor) return row * kRowBytes + sparse24_chunk_place(row, chunk()) * 16;
    return (chunk() * sparse24_rows_of_chunk(kRows, kChunks) + row) * 16;
  }

  const unsigned char* source_;
  int row_bytes_, rows_left_, bytes_left_;
};

// Fills stages in the order in which the block will use them. What a thread copies stays at the
// same place of its rows from slice to slice: pointers are worked out once and move on.
template <class Tile, bool kAligned>
class Sparse24SliceLoader {
 public:
  // The slices [first_slice, slices_end) of the tile that begins at token m0 and row n0.
  __device__ Sparse24SliceLoader(const Sparse24Product& product, const Sparse24Grid& grid,
                                 unsigned char* stages, int m0, int n0, int first_slice,
                                 int slices_end)
      : product_(product),
        grid_(grid),
        stages_(stages),
        slices_left_(slices_end - first_slice),
        values_(static_cast<const unsigned char*>(product.values), grid.value_bytes, n0, grid.n,
                first_slice),
        tokens_(static_cast<const unsigned char*>(product.x), grid.token_bytes, m0, grid.m,
                first_slice) {
    const int thread = static_cast<int>(threadIdx.x);
    meta_at_ = first_slice * Tile::kMetaRowBytes + thread % kMetaChunks * 16;
#pragma unroll
    for (int i = 0; i < kMetaCopies; ++i) {
      const int row = thread / kMetaChunks + i * (Tile::kThreads / kMetaChunks);
      meta_rows_[i] =
          product.meta + static_cast<int64_t>(min(n0 + row, grid.n - 1)) * grid.meta_bytes;
    }
    if constexpr (kInt4) {
      const int row = thread % Tile::kRows;
      first_term_ = static_cast<int64_t>(min(n0 + row, grid.n - 1)) * grid.groups;
      chunk_ = first_slice * kChunksOfSlice + thread / Tile::kRows * chunks_of_term(grid);
    }
  }

  // Starts the copies of the next slice, and loads its scales into registers; commits a group, an
  // empty one if there is no such slice.
  __device__ __forceinline__ void start(int stage) {
    pending_ = slices_left_ > 0;
    if (pending_) {
      unsigned char* target = stages_ + stage * Tile::kStageBytes;
      values_.template copy<kAligned>(target);
      copy_metadata(target + Tile::kMetaOffset);
      tokens_.template copy<kAligned>(target + Tile::kTokenOffset);
      if constexpr (kInt4) load_terms();
      --slices_left_;
    }
    ptx::cp_async_commit();
  }

  // Stores the scales that start() loaded.
  __device__ __forceinline__ void finish(int stage) {
    if constexpr (kInt4) {
      if (pending_) terms_.store(stages_ + stage * Tile::kStageBytes, grid_.terms_of_slice);
    }
  }

 private:
  static constexpr bool kInt4 = Tile::kKind == Sparse24Kind::kInt4;
  static constexpr int kMetaChunks = Tile::kMetaChunks;
  static constexpr int kMetaCopies =
      (Tile::kRows * kMetaChunks + Tile::kThreads - 1) / Tile::kThreads;
  static constexpr int kChunksOfSlice = Tile::kSliceK / kSparse24ChunkK;
  static_assert(Tile::kThreads % kMetaChunks == 0);
  static_assert(!kInt4 || Tile::kThreads % Tile::kRows == 0);

  static __device__ __forceinline__ int chunks_of_term(const Sparse24Grid& grid) {
    return Tile::kWarpK / kSparse24ChunkK >> grid.terms_shift;
  }

  // What does not exist is the last row's metadata, and the last word once more.
  __device__ __forceinline__ void copy_metadata(unsigned char* target) {
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < kMetaCopies; ++i) {
      const int row = thread / kMetaChunks + i * (Tile::kThreads / kMetaChunks);
      if (Tile::kRows * kMetaChunks % Tile::kThreads != 0 && row >= Tile::kRows) break;
      unsigned char* to = target + (thread % kMetaChunks * Tile::kMetaChunkRows + row) * 16;
      if (grid_.meta_aligned) {
        ptx::cp_async_16(to, meta_rows_[i] + min(meta_at_, grid_.meta_bytes - 16), true);
      } else {
#pragma unroll
        for (int word = 0; word < 16; word += 4) {
          ptx::cp_async_4(to + word, meta_rows_[i] + min(meta_at_ + word, grid_.meta_bytes - 4),
                          true);
        }
      }
    }
    meta_at_ += Tile::kMetaRowBytes;
  }

  // Term [part of K][row]: 8 rows that a warp reads at once are neighbours.
  __device__ __forceinline__ void load_terms() {
    switch (product_.kept.scale_dtype) {
      case DType::kFloat16:
        load_terms_of<__half>();
        break;
      case DType::kBFloat16:
        load_terms_of<__nv_bfloat16>();
        break;
      default:
        load_terms_of<float>();
    }
    chunk_ += kChunksOfSlice;
  }

  template <class Scale>
  __device__ __forceinline__ void load_terms_of() {
    const IntnWeight& kept = product_.kept;
    const bool has_zeros = kept.zero_kind == ZeroKind::kInteger;
#pragma unroll
    for (int i = 0; i < PendingTerms<Tile>::kCount; ++i) {
      const int term = static_cast<int>(threadIdx.x) + i * Tile::kThreads;
      if (term >= grid_.terms_of_slice) break;
      const int chunk = chunk_ + i * (Tile::kThreads / Tile::kRows) * chunks_of_term(grid_);
      const int64_t at = first_term_ + min(grid_.group_of(chunk), grid_.groups - 1);
      terms_.scales[i] = to_float(static_cast<const Scale*>(kept.scales)[at]);
      terms_.zeros[i] =
          has_zeros ? static_cast<const uint8_t*>(kept.zeros)[at] : uint8_t{IntnLayout<4>::kMiddle};
    }
  }

  const Sparse24Product& product_;
  const Sparse24Grid& grid_;
  unsigned char* stages_;
  int slices_left_;
  Sparse24Rows<Tile::kRows, Tile::kValueRowBytes, Tile::kThreads, !kInt4> values_;
  Sparse24Rows<Tile::kTokens, Tile::kTokenRowBytes, Tile::kThreads, true> tokens_;
  int meta_at_;
  const unsigned char* meta_rows_[kMetaCopies];
  bool pending_ = false;
  int64_t first_term_ = 0;  // of the thread's row
  int chunk_ = 0;           // of kSparse24ChunkK columns, of the thread's first term
  PendingTerms<Tile> terms_;
};

}  // namespace pumice::cuda
