// kernel: int8_gemm
//
// y = (scale·(q weightᵀ) + outliers)·weight_scale + bias on the int8 tensor cores.
//
// Each block is persistent and takes tiles of y by turns. Slices of 128 bytes of q and weight run
// through a ring of stages in shared memory (cp.async), across tiles: the next tile's first slices
// arrive while this one's outliers are added and its y is stored. Warps read fragments by ldmatrix,
// one k step ahead of the mma.sync that use them.
//
//   slice of q        128 bytes           slice of weight
//   [kBlockM rows] ┌─────────────┐        [kBlockN rows]
//                  │ chunk c of row r lies at place c ^ (r mod 8): the 8 rows that an ldmatrix
//                  │ reads at one chunk are then in 8 different groups of banks
//
// The accumulators become fp32 in place: · scale, then the outlier phase (int8_outliers.h) adds to
// the same registers, then the epilogue. Nothing is read back and nothing is launched in between.
//
// Floor at M = N = K = 4096 on an H200: 137 TOP / 1979 TOPS = 69 µs; bytes 67 MB = 16 µs. mma.sync
// reaches some 62 % of the wgmma peak (112 µs); expected 55 %, 125 µs, against 195 µs for bf16 at
// 700 TFLOPS. A Hopper-native kernel takes its place by a row of its own in the tile table.
#include "cuda/gemm/int8_gemm.h"

#include "cuda/gemm/int8_epilogue.h"
#include "cuda/gemm/int8_outliers.h"
#include "cuda/gemm/int8_tiles.h"
#include "cuda/gemm/unaligned.h"
#include "cuda/launch.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mma.h"

namespace pumice::cuda {
namespace {

constexpr int kSliceBytes = kInt8BlockK;         // a row of a slice
constexpr int kChunks = kSliceBytes / 16;        // of a row
constexpr int kStepsOfSlice = kSliceBytes / 32;  // mma.m16n8k32

// Blocks run at the same time on neighbouring tiles; in bands of 16 tiles along M these need the
// fewest different rows of q and weight, which then come from L2.
constexpr int kBandTiles = 16;

struct TileGrid {
  int tiles_m, tiles_n;

  __device__ __forceinline__ int count() const { return tiles_m * tiles_n; }
  __device__ __forceinline__ void locate(int tile, int& tile_m, int& tile_n) const {
    const int band_size = kBandTiles * tiles_n;
    const int first_m = tile / band_size * kBandTiles;
    const int band_m = min(tiles_m - first_m, kBandTiles);
    tile_m = first_m + tile % band_size % band_m;
    tile_n = tile % band_size / band_m;
  }
};

// Fills stages in the order in which the block will use them: slice after slice, tile after tile.
// Each thread copies one chunk of every kRowStep-th row.
template <class Tile, bool kAligned>
class SliceLoader {
 public:
  static constexpr int kRowStep = Tile::kThreads / kChunks;
  static constexpr int kStageBytes = (Tile::kBlockM + Tile::kBlockN) * kSliceBytes;
  static_assert(kRowStep % 8 == 0 && Tile::kBlockM % kRowStep == 0 &&
                Tile::kBlockN % kRowStep == 0);

  __device__ SliceLoader(const Int8Product& product, const Int8Tokens& tokens, const TileGrid& grid,
                         unsigned char* stages)
      : product_(product), tokens_(tokens), grid_(grid), tile_(static_cast<int>(blockIdx.x)) {
    const int row = static_cast<int>(threadIdx.x) / kChunks;
    const int chunk = static_cast<int>(threadIdx.x) % kChunks;
    column_ = chunk * 16;
    target_ = stages + row * kSliceBytes + (chunk ^ (row & 7)) * 16;
    start_tile();
  }

  // The next slice into `stage`, if there is one; commits a group in any case.
  __device__ __forceinline__ void load_next(int stage) {
    if (tile_ < grid_.count()) {
      unsigned char* target = target_ + stage * kStageBytes;
      load_rows<Tile::kBlockM>(target, q_, tokens_.stride, rows_of_q_);
      load_rows<Tile::kBlockN>(target + Tile::kBlockM * kSliceBytes, weight_, product_.k,
                               rows_of_weight_);
      k_ += kSliceBytes;
      q_ += kSliceBytes;
      weight_ += kSliceBytes;
      if (k_ >= product_.k) {
        tile_ += static_cast<int>(gridDim.x);
        start_tile();
      }
    }
    ptx::cp_async_commit();
  }

 private:
  __device__ __forceinline__ void start_tile() {
    if (tile_ >= grid_.count()) return;
    int tile_m, tile_n;
    grid_.locate(tile_, tile_m, tile_n);
    const int row = static_cast<int>(threadIdx.x) / kChunks;
    const int64_t m = static_cast<int64_t>(tile_m) * Tile::kBlockM + row;
    const int64_t n = static_cast<int64_t>(tile_n) * Tile::kBlockN + row;
    k_ = 0;
    q_ = tokens_.q + m * tokens_.stride + column_;
    weight_ = product_.weight + n * product_.k + column_;
    rows_of_q_ = static_cast<int>(min(product_.m - m, int64_t{Tile::kBlockM}));
    rows_of_weight_ = static_cast<int>(min(product_.n - n, int64_t{Tile::kBlockN}));
  }

  template <int kRows>
  __device__ __forceinline__ void load_rows(unsigned char* target, const int8_t* source,
                                            int64_t stride, int rows_left) const {
    const int64_t bytes_left = product_.k - k_ - column_;
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
  TileGrid grid_;
  int tile_, column_, rows_of_q_, rows_of_weight_;
  int64_t k_;
  unsigned char* target_;
  const int8_t* q_;
  const int8_t* weight_;
};

// The operands of one k step of a warp, and where it reads them.
template <class Tile>
struct Fragments {
  uint32_t a[Tile::kWarpM / 16][4];
  uint32_t b[Tile::kWarpN / 8][2];

  __device__ __forceinline__ void load(const unsigned char* a_rows, const unsigned char* b_rows,
                                       int step) {
    // Lanes 0-7, 8-15, ..: rows of the four matrices in the order of ptx/mma.h.
    const int lane = lane_index();
    const int a_chunk = (lane / 16 + 2 * step) ^ (lane % 8);
    const int b_chunk = (lane / 8 % 2 + 2 * step) ^ (lane % 8);
#pragma unroll
    for (int i = 0; i < Tile::kWarpM / 16; ++i) {
      ptx::ldmatrix_x4(a[i], a_rows + (i * 16 + lane % 16) * kSliceBytes + a_chunk * 16);
    }
#pragma unroll
    for (int j = 0; j < Tile::kWarpN / 8; j += 2) {
      const int row = j * 8 + lane / 16 * 8 + lane % 8;
      ptx::ldmatrix_x4(b[j][0], b[j][1], b[j + 1][0], b[j + 1][1],
                       b_rows + row * kSliceBytes + b_chunk * 16);
    }
  }
};

template <class Tile>
__device__ __forceinline__ OutlierShared outlier_shared(unsigned char* memory, bool split) {
  OutlierShared shared;
  const auto take = [&](int bytes) {
    unsigned char* piece = memory;
    memory += bytes;
    return piece;
  };
  shared.residual = take(Tile::kBlockM * kOutlierStep * 2);
  shared.residual_low = take(split ? Tile::kBlockM * kOutlierStep * 2 : 0);
  shared.weight = take(Tile::kBlockN * kOutlierStep * 2);
  shared.columns = reinterpret_cast<int32_t*>(take(kOutlierListCapacity * 4));
  shared.list_state = reinterpret_cast<int32_t*>(take(4 * 4));
  shared.mask = reinterpret_cast<uint32_t*>(memory);
  return shared;
}

template <class Tile, bool kAligned, bool kOutliers>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    int8_gemm_kernel(const __grid_constant__ Int8Product product,
                     const __grid_constant__ Int8Tokens tokens,
                     const __grid_constant__ Int8Outliers outliers, TileGrid grid) {
  using Loader = SliceLoader<Tile, kAligned>;
  constexpr int kFragmentsM = Tile::kWarpM / 16, kFragmentsN = Tile::kWarpN / 8;
  unsigned char* stages = dynamic_shared_memory<unsigned char>();
  const int warp_row = warp_index() / Tile::kWarpsN * Tile::kWarpM;
  const int warp_column = warp_index() % Tile::kWarpsN * Tile::kWarpN;
  const unsigned char* a_rows = stages + warp_row * kSliceBytes;
  const unsigned char* b_rows = stages + (Tile::kBlockM + warp_column) * kSliceBytes;

  Loader loader(product, tokens, grid, stages);
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) loader.load_next(stage);

  const OutlierShared shared = outlier_shared<Tile>(stages + Tile::kStages * Loader::kStageBytes,
                                                    product.y_dtype == DType::kFloat32);
  std::conditional_t<kOutliers, OutlierColumns<Tile::kThreads>, NoOutliers> columns(outliers,
                                                                                    shared);

  const int slices = static_cast<int>((product.k + kSliceBytes - 1) / kSliceBytes);
  Fragments<Tile> fragments[2];
  ptx::cp_async_wait<Tile::kStages - 2>();
  __syncthreads();
  fragments[0].load(a_rows, b_rows, 0);

  int stage = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < grid.count();
       tile += static_cast<int>(gridDim.x)) {
    int32_t sum[kFragmentsM][kFragmentsN][4] = {};
    const bool last_tile = tile + static_cast<int>(gridDim.x) >= grid.count();
#pragma unroll 1
    for (int slice = 0; slice < slices; ++slice) {
      const bool last = last_tile && slice == slices - 1;
#pragma unroll
      for (int step = 0; step < kStepsOfSlice; ++step) {
        if (step == 0) {
          // The stage before this one is free: all warps passed the barrier after reading it.
          loader.load_next(stage == 0 ? Tile::kStages - 1 : stage - 1);
        }
        if (step == kStepsOfSlice - 1) {
          stage = stage == Tile::kStages - 1 ? 0 : stage + 1;
          ptx::cp_async_wait<Tile::kStages - 2>();
          __syncthreads();
        }
        if (step != kStepsOfSlice - 1 || !last) {
          fragments[(step + 1) % 2].load(a_rows + stage * Loader::kStageBytes,
                                         b_rows + stage * Loader::kStageBytes,
                                         (step + 1) % kStepsOfSlice);
        }
        const Fragments<Tile>& f = fragments[step % 2];
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
          for (int j = 0; j < kFragmentsN; ++j) ptx::mma_m16n8k32_s8(sum[i][j], f.a[i], f.b[j]);
        }
      }
    }

    int tile_m, tile_n;
    grid.locate(tile, tile_m, tile_n);
    const int64_t m0 = static_cast<int64_t>(tile_m) * Tile::kBlockM;
    const int64_t n0 = static_cast<int64_t>(tile_n) * Tile::kBlockN;
    float out[kFragmentsM][kFragmentsN][4];
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t m = m0 + warp_row + i * 16 + half * 8 + lane_index() / 4;
        const float scale = m < product.m ? tokens.scale[m * tokens.scale_stride] : 0.0f;
#pragma unroll
        for (int j = 0; j < kFragmentsN; ++j) {
#pragma unroll
          for (int c = 2 * half; c < 2 * half + 2; ++c) {
            out[i][j][c] = static_cast<float>(sum[i][j][c]) * scale;
          }
        }
      }
    }
    const auto finish = [&](auto element) {
      using T = decltype(element);
      if constexpr (kOutliers) {
        add_outliers<T, Tile>(out, columns, product, tokens, outliers, shared, m0, n0, warp_row,
                              warp_column);
      }
      store_tile<T>(out, product, m0 + warp_row, n0 + warp_column);
    };
    switch (product.y_dtype) {
      case DType::kFloat32:
        finish(float{});
        break;
      case DType::kFloat16:
        finish(__half{});
        break;
      case DType::kBFloat16:
        finish(__nv_bfloat16{});
        break;
    }
  }
}

template <class Tile, bool kAligned>
void launch_tile(const Int8Product& product, const Int8Tokens& tokens, const Int8Outliers& outliers,
                 const TileGrid& grid, int blocks, size_t shared_bytes, cudaStream_t stream) {
  launch(
      outliers.x ? int8_gemm_kernel<Tile, kAligned, true> : int8_gemm_kernel<Tile, kAligned, false>,
      dim3(blocks), dim3(Tile::kThreads), shared_bytes, stream, product, tokens, outliers, grid);
}

}  // namespace

void int8_gemm(const Int8Product& product, const Int8Tokens& tokens, const Int8Outliers& outliers,
               const Int8Device& device, cudaStream_t stream) {
  const Int8GemmShape shape = {product.m, product.n, product.k,
                               outliers.x ? outliers.mask_words : 0, product.y_dtype};
  // Rows that are not aligned come a byte at a time, which is slow with any tile: one will do.
  const bool aligned = rows_are_aligned_16(tokens.q, tokens.stride) &&
                       rows_are_aligned_16(product.weight, product.k);
  const Int8TileRow tile =
      aligned ? choose_int8_tile(shape, device.sm_count, device.shared_memory_limit)
              : kInt8Tiles[0];
  const int64_t tiles_m = tiles_along(product.m, tile.block_m);
  const int64_t tiles_n = tiles_along(product.n, tile.block_n);
  STD_TORCH_CHECK(tiles_m * tiles_n <= INT32_MAX / 2, "pumice: an int8 product of ", product.m,
                  " × ", product.n, " outputs is too large for one launch");
  const TileGrid grid = {static_cast<int>(tiles_m), static_cast<int>(tiles_n)};
  const int blocks = int8_gemm_blocks(tile, shape, device.sm_count, device.shared_memory_limit);
  const size_t bytes = int8_shared_bytes(tile, shape);
  if (!aligned) {
    return launch_tile<Tile64x64Shallow, false>(product, tokens, outliers, grid, blocks, bytes,
                                                stream);
  }
  switch (tile.name) {
    case Int8TileName::k64x64Shallow:
      return launch_tile<Tile64x64Shallow, true>(product, tokens, outliers, grid, blocks, bytes,
                                                 stream);
    case Int8TileName::k64x64:
      return launch_tile<Tile64x64, true>(product, tokens, outliers, grid, blocks, bytes, stream);
    case Int8TileName::k128x64:
      return launch_tile<Tile128x64, true>(product, tokens, outliers, grid, blocks, bytes, stream);
    case Int8TileName::k128x128:
      return launch_tile<Tile128x128, true>(product, tokens, outliers, grid, blocks, bytes, stream);
    case Int8TileName::k128x256:
      return launch_tile<Tile128x256, true>(product, tokens, outliers, grid, blocks, bytes, stream);
    case Int8TileName::k128x256Shallow:
      return launch_tile<Tile128x256Shallow, true>(product, tokens, outliers, grid, blocks, bytes,
                                                   stream);
  }
}

}  // namespace pumice::cuda
