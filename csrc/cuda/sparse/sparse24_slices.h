// How slices of the operands of the 2:4 products get into shared memory.
//
// A stage of the ring holds, for one slice of K:
//   values    16 and 8 bit: [row][16-byte chunk], swizzled for ldmatrix; int4: [chunk][row]
//   metadata  [chunk][row], so that the rows that a warp reads at once are neighbours
//   x         [token][chunk], swizzled
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
#include "cuda/ptx/cp_async.h"
#include "cuda/sparse/sparse24_gemm.h"

namespace pumice::cuda {

// Where chunk c of a row lies in its row: the 8 rows of an ldmatrix, at one chunk, are in 8
// different groups of 4 banks.
__device__ __forceinline__ int sparse24_chunk_place(int row, int c) { return c ^ (row & 7); }

// Numbers of a launch, worked out on the host: what a kernel's argument holds takes no register.
struct Sparse24Grid {
  int tiles_m, tiles_n, parts, slices;
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

  // Tiles in bands of 8 along M, so that the blocks that run at the same time need the fewest
  // different rows of x and weights, which then come from L2.
  static constexpr int kBand = 8;
  __device__ __forceinline__ void locate(int tile, int& tile_m, int& tile_n) const {
    const int first_m = tile / (kBand * tiles_n) * kBand;
    const int band = min(tiles_m - first_m, kBand);
    tile_m = first_m + tile % (kBand * tiles_n) % band;
    tile_n = tile % (kBand * tiles_n) / band;
  }
};

template <class Tile, bool kAligned>
class Sparse24SliceLoader {
 public:
  __device__ Sparse24SliceLoader(const Sparse24Product& product, const Sparse24Grid& grid,
                                 unsigned char* stages, int m0, int n0)
      : product_(product), grid_(grid), stages_(stages), m0_(m0), n0_(n0) {}

  // Starts the copies of a slice, and loads its scales into registers; commits a group. A slice
  // that does not exist becomes an empty group.
  __device__ __forceinline__ void start(int slice, int slices_end, int stage) {
    pending_ = slice < slices_end;
    if (pending_) {
      unsigned char* target = stages_ + stage * Tile::kStageBytes;
      if constexpr (kInt4) {
        copy_packed(slice, target);
        load_terms(slice);
      } else {
        copy_rows<Tile::kRows, Tile::kValueRowBytes>(
            static_cast<const unsigned char*>(product_.values), grid_.value_bytes, n0_, grid_.n,
            slice, target);
      }
      copy_metadata(slice, target + Tile::kMetaOffset);
      copy_rows<Tile::kTokens, Tile::kTokenRowBytes>(static_cast<const unsigned char*>(product_.x),
                                                     grid_.token_bytes, m0_, grid_.m, slice,
                                                     target + Tile::kTokenOffset);
    }
    ptx::cp_async_commit();
  }

  // Stores the scales that start() loaded.
  __device__ __forceinline__ void finish(int stage) {
    if constexpr (kInt4) {
      if (!pending_) return;
      unsigned char* target = stages_ + stage * Tile::kStageBytes;
      auto* scales = reinterpret_cast<float*>(target + Tile::kScaleOffset);
      unsigned char* zeros = target + Tile::kZeroOffset;
#pragma unroll
      for (int i = 0; i < kTermsOfThread; ++i) {
        const int term = static_cast<int>(threadIdx.x) + i * Tile::kThreads;
        if (term >= grid_.terms_of_slice) break;
        scales[term] = scales_[i];
        zeros[term] = zeros_[i];
      }
    }
  }

 private:
  static constexpr bool kInt4 = Tile::kKind == Sparse24Kind::kInt4;
  static constexpr int kTermsOfThread =
      kInt4 ? (Tile::kTerms + Tile::kThreads - 1) / Tile::kThreads : 1;

  // 16 bytes, of which `valid` exist (16 or more, or none, if kAligned).
  static __device__ __forceinline__ void copy_16(unsigned char* to, const unsigned char* source,
                                                 int valid) {
    if constexpr (kAligned) {
      ptx::cp_async_16(to, source, valid > 0);
    } else {
      *reinterpret_cast<uint4*>(to) = load_unaligned_16(source, valid);
    }
  }

  // A slice of kRows rows, kRowBytes of each, swizzled.
  template <int kRows, int kRowBytes>
  static __device__ __forceinline__ void copy_rows(const unsigned char* matrix, int row_bytes,
                                                   int first_row, int rows, int slice,
                                                   unsigned char* target) {
    constexpr int kChunks = kRowBytes / 16;
    constexpr int kStep = Tile::kThreads / kChunks;
    static_assert(Tile::kThreads % kChunks == 0 && kRows % kStep == 0);
    const int row = static_cast<int>(threadIdx.x) / kChunks;
    const int chunk = static_cast<int>(threadIdx.x) % kChunks;
    const int at = slice * kRowBytes + chunk * 16;
    const int rows_left = rows - first_row - row;
    const unsigned char* source = matrix + static_cast<int64_t>(first_row + row) * row_bytes + at;
#pragma unroll
    for (int i = 0; i < kRows / kStep; ++i) {
      const int place = sparse24_chunk_place(row + i * kStep, chunk);
      copy_16(target + (row + i * kStep) * kRowBytes + place * 16, source,
              i * kStep < rows_left ? row_bytes - at : 0);
      source += static_cast<int64_t>(kStep) * row_bytes;
    }
  }

  // Packed int4 values, [chunk][row]; neighbouring threads take the chunks of a row.
  __device__ __forceinline__ void copy_packed(int slice, unsigned char* target) const {
    constexpr int kChunks = Tile::kValueRowBytes / 16;
#pragma unroll
    for (int first = 0; first < Tile::kRows * kChunks; first += Tile::kThreads) {
      const int i = first + static_cast<int>(threadIdx.x);
      if (first + Tile::kThreads > Tile::kRows * kChunks && i >= Tile::kRows * kChunks) break;
      const int row = i / kChunks, chunk = i % kChunks;
      const int at = slice * Tile::kValueRowBytes + chunk * 16;
      copy_16(target + (chunk * Tile::kRows + row) * 16,
              static_cast<const unsigned char*>(product_.values) +
                  static_cast<int64_t>(n0_ + row) * grid_.value_bytes + at,
              n0_ + row < grid_.n ? grid_.value_bytes - at : 0);
    }
  }

  // Metadata, [chunk][row]. What does not exist is the last row's, and the last word once more.
  __device__ __forceinline__ void copy_metadata(int slice, unsigned char* target) const {
    constexpr int kChunks = Tile::kMetaRowBytes / 16;
#pragma unroll
    for (int first = 0; first < Tile::kRows * kChunks; first += Tile::kThreads) {
      const int i = first + static_cast<int>(threadIdx.x);
      if (first + Tile::kThreads > Tile::kRows * kChunks && i >= Tile::kRows * kChunks) break;
      const int row = i / kChunks, chunk = i % kChunks;
      const int at = slice * Tile::kMetaRowBytes + chunk * 16;
      const unsigned char* source =
          product_.meta + static_cast<int64_t>(min(n0_ + row, grid_.n - 1)) * grid_.meta_bytes;
      unsigned char* to = target + (chunk * Tile::kRows + row) * 16;
      if (grid_.meta_aligned) {
        ptx::cp_async_16(to, source + min(at, grid_.meta_bytes - 16), true);
      } else {
#pragma unroll
        for (int word = 0; word < 16; word += 4) {
          ptx::cp_async_4(to + word, source + min(at + word, grid_.meta_bytes - 4), true);
        }
      }
    }
  }

  // Term [part of K][row]: 8 rows that a warp reads at once are neighbours.
  __device__ __forceinline__ void load_terms(int slice) {
    switch (product_.kept.scale_dtype) {
      case DType::kFloat16:
        return load_terms_of<__half>(slice);
      case DType::kBFloat16:
        return load_terms_of<__nv_bfloat16>(slice);
      default:
        return load_terms_of<float>(slice);
    }
  }

  template <class Scale>
  __device__ __forceinline__ void load_terms_of(int slice) {
    const IntnWeight& kept = product_.kept;
    const bool has_zeros = kept.zero_kind == ZeroKind::kInteger;
#pragma unroll
    for (int i = 0; i < kTermsOfThread; ++i) {
      const int term = static_cast<int>(threadIdx.x) + i * Tile::kThreads;
      if (term >= grid_.terms_of_slice) break;
      const int64_t n = min(n0_ + term % Tile::kRows, grid_.n - 1);
      const int chunk = slice * (Tile::kSliceK / kSparse24ChunkK) +
                        term / Tile::kRows * (Tile::kWarpK / kSparse24ChunkK >> grid_.terms_shift);
      const int64_t at = n * grid_.groups + min(grid_.group_of(chunk), grid_.groups - 1);
      scales_[i] = to_float(static_cast<const Scale*>(kept.scales)[at]);
      zeros_[i] =
          has_zeros ? static_cast<const uint8_t*>(kept.zeros)[at] : uint8_t{IntnLayout<4>::kMiddle};
    }
  }

  const Sparse24Product& product_;
  const Sparse24Grid& grid_;
  unsigned char* stages_;
  int m0_, n0_;
  bool pending_ = false;
  float scales_[kTermsOfThread];
  uint8_t zeros_[kTermsOfThread];
};

}  // namespace pumice::cuda
