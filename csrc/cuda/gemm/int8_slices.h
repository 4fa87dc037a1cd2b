// How int8_gemm walks through its operands: the items of work, the ring of slices in shared memory,
// and the fragments a warp reads from a slice.
#pragma once

#include "cuda/gemm/int8_gemm.h"
#include "cuda/gemm/int8_tiles.h"
#include "cuda/gemm/unaligned.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/thread.h"

namespace pumice::cuda {

constexpr int kSliceBytes = kInt8BlockK;         // a row of a slice
constexpr int kChunks = kSliceBytes / 16;        // of a row
constexpr int kStepsOfSlice = kSliceBytes / 32;  // mma.m16n8k32

// Blocks run at the same time on neighbouring tiles; in bands of 16 tiles along M these need the
// fewest different rows of q and weight, which then come from L2.
constexpr int kBandTiles = 16;

// What there is to do: items are parts of tiles, the parts of a tile next to each other.
struct Int8Work {
  int tiles_m, tiles_n, parts, slices;
  int32_t* partial_sums;  // [item][fragment][thread], used if parts > 1
  uint32_t* tickets;      // [tile], zero at the start

  __device__ __forceinline__ int items() const { return tiles_m * tiles_n * parts; }
  __device__ __forceinline__ void locate(int item, int& tile_m, int& tile_n) const {
    const int tile = item / parts;
    const int band_size = kBandTiles * tiles_n;
    const int first_m = tile / band_size * kBandTiles;
    const int band_m = min(tiles_m - first_m, kBandTiles);
    tile_m = first_m + tile % band_size % band_m;
    tile_n = tile % band_size / band_m;
  }
  // Part p of P takes the slices from p·slices/P on.
  __device__ __forceinline__ int first_slice(int item) const {
    return static_cast<int>(static_cast<int64_t>(item % parts) * slices / parts);
  }
  __device__ __forceinline__ int slices_of(int item) const {
    return static_cast<int>(static_cast<int64_t>(item % parts + 1) * slices / parts) -
           first_slice(item);
  }
};

// Fills stages in the order in which the block will use them: slice after slice, tile after tile.
// Each thread copies one chunk of every kRowStep-th row.
template <class Tile, bool kAligned>
class Int8SliceLoader {
 public:
  static constexpr int kRowStep = Tile::kThreads / kChunks;
  static constexpr int kStageBytes = (Tile::kBlockM + Tile::kBlockN) * kSliceBytes;
  static_assert(kRowStep % 8 == 0 && Tile::kBlockM % kRowStep == 0 &&
                Tile::kBlockN % kRowStep == 0);

  __device__ Int8SliceLoader(const Int8Product& product, const Int8Tokens& tokens,
                             const Int8Work& work, unsigned char* stages)
      : product_(product), tokens_(tokens), work_(work), item_(static_cast<int>(blockIdx.x)) {
    const int row = static_cast<int>(threadIdx.x) / kChunks;
    const int chunk = static_cast<int>(threadIdx.x) % kChunks;
    target_ = stages + row * kSliceBytes + (chunk ^ (row & 7)) * 16;
    start_item();
  }

  // The next slice into `stage`, if there is one; closes a group of copies in any case.
  __device__ __forceinline__ void load_next(int stage) {
    if (item_ < work_.items()) {
      unsigned char* target = target_ + stage * kStageBytes;
      load_rows<Tile::kBlockM>(target, q_, tokens_.stride, rows_of_q_);
      load_rows<Tile::kBlockN>(target + Tile::kBlockM * kSliceBytes, weight_, product_.k,
                               rows_of_weight_);
      k_ += kSliceBytes;
      q_ += kSliceBytes;
      weight_ += kSliceBytes;
      if (--slices_left_ == 0) {
        item_ += static_cast<int>(gridDim.x);
        start_item();
      }
    }
    ptx::cp_async_commit();
  }

 private:
  __device__ __forceinline__ void start_item() {
    if (item_ >= work_.items()) return;
    int tile_m, tile_n;
    work_.locate(item_, tile_m, tile_n);
    const int thread = ptx::thread_index_here();
    const int row = thread / kChunks;
    const int64_t m = static_cast<int64_t>(tile_m) * Tile::kBlockM + row;
    const int64_t n = static_cast<int64_t>(tile_n) * Tile::kBlockN + row;
    slices_left_ = work_.slices_of(item_);
    k_ = work_.first_slice(item_) * kSliceBytes + thread % kChunks * 16;
    q_ = tokens_.q + m * tokens_.stride + k_;
    weight_ = product_.weight + n * product_.k + k_;
    rows_of_q_ = static_cast<int>(min(product_.m - m, int64_t{Tile::kBlockM}));
    rows_of_weight_ = static_cast<int>(min(product_.n - n, int64_t{Tile::kBlockN}));
  }

  template <int kRows>
  __device__ __forceinline__ void load_rows(unsigned char* target, const int8_t* source,
                                            int64_t stride, int rows_left) const {
    const int bytes_left = static_cast<int>(product_.k) - k_;
#pragma unroll
    for (int i = 0; i < kRows / kRowStep; ++i) {
      const bool inside = i * kRowStep < rows_left && bytes_left > 0;
      if constexpr (kAligned) {
        ptx::cp_async_16(target + i * kRowStep * kSliceBytes, source, inside);
      } else {
        *reinterpret_cast<uint4*>(target + i * kRowStep * kSliceBytes) =
            load_unaligned_16(source, inside ? bytes_left : 0);
      }
      source += kRowStep * stride;
    }
  }

  const Int8Product& product_;
  const Int8Tokens& tokens_;
  const Int8Work& work_;
  int item_, k_, slices_left_, rows_of_q_, rows_of_weight_;
  unsigned char* target_;
  const int8_t* q_;
  const int8_t* weight_;
};

// A warp's operands, read from a slice by ldmatrix: lanes 0-7, 8-15, .. give the rows of the four
// matrices in the order of ptx/mma.h. `rows` is where the warp's first row lies.
template <int kFragmentsM>
__device__ __forceinline__ void load_a(uint32_t (&a)[kFragmentsM][4], const unsigned char* rows,
                                       int step) {
  const int lane = lane_index();
  const int chunk = (lane / 16 + 2 * step) ^ (lane % 8);
#pragma unroll
  for (int i = 0; i < kFragmentsM; ++i) {
    ptx::ldmatrix_x4(a[i], rows + (i * 16 + lane % 16) * kSliceBytes + chunk * 16);
  }
}

// B operands j and j + 1.
__device__ __forceinline__ void load_b_pair(uint32_t (&b0)[2], uint32_t (&b1)[2],
                                            const unsigned char* rows, int j, int step) {
  const int lane = lane_index();
  const int chunk = (lane / 8 % 2 + 2 * step) ^ (lane % 8);
  const int row = j * 8 + lane / 16 * 8 + lane % 8;
  ptx::ldmatrix_x4(b0[0], b0[1], b1[0], b1[1], rows + row * kSliceBytes + chunk * 16);
}

template <int kFragmentsN>
__device__ __forceinline__ void load_b(uint32_t (&b)[kFragmentsN][2], const unsigned char* rows,
                                       int step) {
#pragma unroll
  for (int j = 0; j < kFragmentsN; j += 2) load_b_pair(b[j], b[j + 1], rows, j, step);
}

}  // namespace pumice::cuda
