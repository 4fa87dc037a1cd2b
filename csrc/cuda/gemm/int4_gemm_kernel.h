// kernel int4_gemm: y = x·Wᵀ + outliers + low rank + bias, for packed weights of 4 bits and any M.
//
// The weights are the A operand of the mma (16 rows of N), the tokens the B operand (8 of them), so
// that few tokens waste little. Slices of K run through a ring of stages in shared memory
// (int4_slices.h). An ldmatrix of packed weights hands lane (g, t) word t of row g: 8 values of K
// of one row, which are its operands of two mma, and the 32 values of these two mma lie in one
// group. So integers are multiplied, q - zero, exactly, and a group's scale is applied in fp32 to
// its sum: no weight is ever rounded.
//
//   warp's 128 values of K │ chunk 0 (2 mma) │ chunk 1 │ chunk 2 │ chunk 3 │  · scale, add
//                             after each chunk, or after the fourth, where groups are that long
//
// Widening takes 9 instructions for a word of 8 weights in fp16 (4 lop3, a shift, 4 half2), 11 in
// bf16. With fragments of x, addresses, scales and the filling of the ring that becomes some 4 for
// a weight with 8 tokens (counted in the machine code, groups of 128). Reading weights at 4.3 TB/s,
// an SM of an H200 has 3.4 issue slots of a lane for each: instructions are the limit, not memory,
// from some 85 % of the bandwidth on.
//
// General path (other widths, g_idx, fractional zero points, groups of 16): each lane fetches and
// dequantizes its 8 values by itself, rounds them to 16 bits (fp32: to two bf16) and multiplies. At
// some 15 instructions a weight, and with loads that nothing hides, expect a fifth of the speed.
//
// At the end the warps' sums are added in shared memory in a fixed order. Where K is cut into
// parts, blocks leave their sums in global memory, and the one that takes the last ticket of a tile
// adds all parts, also in a fixed order: the result does not depend on who was last.
#pragma once

#include "cuda/gemm/int4_slices.h"
#include "cuda/launch.h"
#include "cuda/ptx/ldmatrix.h"

namespace pumice::cuda {

// A warp's place in the tile, and its sums.
template <class T, class Tile, bool kGeneral>
class Int4Warp {
 public:
  static constexpr int kRowTiles = Tile::kRowTiles, kTokenTiles = Tile::kTokenTiles;
  static constexpr bool kSplit = Tile::kPlanes == 2;

  __device__ Int4Warp(const Int4Product& product, const Int4Grid& grid, int n0)
      : product_(product), grid_(grid), n_(n0 + place_.row) {}

  __device__ __forceinline__ void multiply(const unsigned char* stage, int slice) {
    const int k0 = slice * Tile::kSliceK + place_.warp_k * kInt4WarpK;
    if (k0 >= product_.weight.k) return;
    if constexpr (kGeneral) {
#pragma unroll 1
      for (int chunk = 0; chunk < kInt4WarpK / kInt4ChunkK; ++chunk) {
        multiply_dequantized(stage, k0, chunk);
      }
    } else {
#pragma unroll
      for (int chunk = 0; chunk < kInt4WarpK / kInt4ChunkK; ++chunk) {
        multiply_integers(stage, chunk);
      }
    }
  }

  __device__ __forceinline__ void store_sums(float* sums) const {
    store_warp_sums<Tile>(sums, sums_.all, place_);
  }

 private:
  __device__ __forceinline__ void load_tokens(const unsigned char* stage, int chunk, int j,
                                              int plane, uint32_t (&b)[2][2]) const {
    const int group = lane_index() / 4, t = lane_index() % 4;
    const int token = place_.token + j * 8 + group;
    const int place = token_chunk_place(group, place_.warp_k * (kInt4WarpK / 8) + chunk * 4 + t);
    token_operands(
        *reinterpret_cast<const uint4*>(stage + Tile::kTokenOffset + plane * Tile::kPlaneBytes +
                                        token * Tile::kTokenRowBytes + place * 16),
        b);
  }

  // One ldmatrix loads the words of both row tiles.
  __device__ __forceinline__ void multiply_integers(const unsigned char* stage, int chunk) {
    static_assert(kRowTiles == 2);
    const int lane = lane_index();
    uint32_t words[2 * kRowTiles];
    const int c = place_.warp_k * (kInt4WarpK / kInt4ChunkK) + chunk;
    ptx::ldmatrix_x4(words, stage + (place_.row + lane) * Tile::kWeightRowBytes +
                                weight_chunk_place<Tile>(lane % 8, c) * 16);
    const int first_term =
        (place_.warp_k * grid_.terms_per_warp + (grid_.terms_per_warp == 1 ? 0 : chunk)) *
            Tile::kRows +
        place_.row + lane / 4;
    uint32_t a[kRowTiles][2][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const unsigned char* zeros = stage + Tile::kZeroOffset + first_term + r * 16;
      int4_operands<T>(words[2 * r], words[2 * r + 1], zero_pairs<T>(zeros[0]),
                       zero_pairs<T>(zeros[8]), a[r]);
    }
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int plane = 0; plane < Tile::kPlanes; ++plane) {
        uint32_t b[2][2];
        load_tokens(stage, chunk, j, plane, b);
#pragma unroll
        for (int mma = 0; mma < 2; ++mma) {
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) mma_16bit<T>(sums_.group[r][j], a[r][mma], b[mma]);
        }
      }
    }
    if (grid_.terms_per_warp != 1 || chunk == kInt4WarpK / kInt4ChunkK - 1) {
      sums_.add_scaled(reinterpret_cast<const float*>(stage + Tile::kScaleOffset) + first_term);
    }
  }

  __device__ __forceinline__ void dequantize(int r, int half, int k,
                                             float (&w)[kWindowValues]) const {
    if (k < product_.weight.k) {
      const int64_t n = min(n_ + r * 16 + half * 8 + lane_index() / 4, grid_.n - 1);
      dequantize_window(product_.weight, n, k / kWindowValues, w);
    } else {
#pragma unroll
      for (float& value : w) value = 0.0f;
    }
  }

  __device__ __forceinline__ void multiply_dequantized(const unsigned char* stage, int k0,
                                                       int chunk) {
    const int k = k0 + chunk * kInt4ChunkK + lane_index() % 4 * kWindowValues;
    uint32_t a[kRowTiles][2][4], low[kRowTiles][2][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      float w[2][kWindowValues];
      dequantize(r, 0, k, w[0]);
      dequantize(r, 1, k, w[1]);
      dequantized_operands<T, kSplit>(w[0], w[1], a[r], low[r]);
    }
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int plane = 0; plane < Tile::kPlanes; ++plane) {
        uint32_t b[2][2];
        load_tokens(stage, chunk, j, plane, b);
#pragma unroll
        for (int mma = 0; mma < 2; ++mma) {
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
            mma_16bit<T>(sums_.all[r][j], a[r][mma], b[mma]);
            // high·high + high·low + low·high
            if (kSplit && plane == 0) mma_16bit<T>(sums_.all[r][j], low[r][mma], b[mma]);
          }
        }
      }
    }
  }

  const Int4Product& product_;
  const Int4Grid& grid_;
  WarpPlace<Tile> place_;
  int n_;
  GroupSums<Tile> sums_;
};

// The dense terms, bias and cast of one output.
__device__ __forceinline__ void store_output(const Int4Product& product, int64_t m, int64_t n,
                                             float y) {
  const MatrixView& outliers = product.outlier_weight;
#pragma unroll 4
  for (int64_t j = 0; j < outliers.columns; ++j) {
    const int64_t at = m * product.weight.k + product.outlier_idx[j];
    y += element_or_zero({product.x, product.y_dtype}, at) *
         element_or_zero({outliers.data, outliers.dtype}, n * outliers.columns + j);
  }
  const MatrixView& factor = product.lora_b;
#pragma unroll 4
  for (int64_t r = 0; r < factor.columns; ++r) {
    y += product.low_rank[m * factor.columns + r] *
         element_or_zero({factor.data, factor.dtype}, n * factor.columns + r);
  }
  store_element(product.y, product.y_dtype, m * product.weight.n + n,
                y + element_or_zero(product.bias, n));
}

template <class T, class Tile, bool kGeneral>
__global__ void __launch_bounds__(Tile::kThreads, kGeneral ? 1 : Tile::kBlocksPerSm)
    int4_gemm_kernel(const __grid_constant__ Int4Product product,
                     const __grid_constant__ Int4Grid grid) {
  unsigned char* stages = dynamic_shared_memory<unsigned char>();
  const int tile = static_cast<int>(blockIdx.x) / grid.parts;
  const int part = static_cast<int>(blockIdx.x) % grid.parts;
  int tile_m, tile_n;
  grid.locate(tile, tile_m, tile_n);
  const int m0 = tile_m * Tile::kTokens, n0 = tile_n * Tile::kRows;
  const int begin = static_cast<int>(static_cast<int64_t>(part) * grid.slices / grid.parts);
  const int end = static_cast<int>(static_cast<int64_t>(part + 1) * grid.slices / grid.parts);

  Int4SliceLoader<Tile, kGeneral> loader(product, grid, stages, m0, n0);
#pragma unroll 1
  for (int i = 0; i < Tile::kStages - 1; ++i) {
    loader.start(begin + i, end, i);
    loader.finish(i);
  }
  Int4Warp<T, Tile, kGeneral> warp(product, grid, n0);
  int stage = 0;
#pragma unroll 1
  for (int slice = begin; slice < end; ++slice) {
    ptx::cp_async_wait<Tile::kStages - 2>();
    __syncthreads();
    // The stage before this one is free: all warps have passed the barrier after reading it.
    const int free_stage = stage == 0 ? Tile::kStages - 1 : stage - 1;
    loader.start(slice + Tile::kStages - 1, end, free_stage);
    warp.multiply(stages + stage * Tile::kStageBytes, slice);
    loader.finish(free_stage);
    stage = stage == Tile::kStages - 1 ? 0 : stage + 1;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  float* sums = dynamic_shared_memory<float>();
  warp.store_sums(sums);
  __syncthreads();

  constexpr int kOutputs = Tile::kRows * Tile::kTokens;
  const auto total_of = [&](int i) {
    const float* at = sums + i / Tile::kRows * Tile::kSumStride + i % Tile::kRows;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < Tile::kWarpsK; ++w) total += at[w * Tile::kTokens * Tile::kSumStride];
    return total;
  };
  const auto finish = [&](int i, float total) {
    const int m = m0 + i / Tile::kRows, n = n0 + i % Tile::kRows;
    if (m < grid.m && n < grid.n) store_output(product, m, n, total);
  };
  const int thread = static_cast<int>(threadIdx.x);
  if (grid.parts == 1) {
    for (int i = thread; i < kOutputs; i += Tile::kThreads) finish(i, total_of(i));
    return;
  }
  float* partial = product.partial_sums + static_cast<int64_t>(tile) * grid.parts * kOutputs;
  for (int i = thread; i < kOutputs; i += Tile::kThreads) {
    partial[static_cast<int64_t>(part) * kOutputs + i] = total_of(i);
  }
  auto* ticket = reinterpret_cast<uint32_t*>(stages + Tile::kTicketOffset);
  if (!takes_last_ticket(product.tickets + tile, grid.parts, ticket)) return;
  for (int i = thread; i < kOutputs; i += Tile::kThreads) {
    float total = 0.0f;
    for (int p = 0; p < grid.parts; ++p) total += partial[static_cast<int64_t>(p) * kOutputs + i];
    finish(i, total);
  }
}

template <class T, class Tile, bool kGeneral>
void launch_int4_gemm(const Int4Product& product, const Int4Plan& plan, cudaStream_t stream) {
  const int64_t tiles = tile_count(plan, product.m, product.weight.n);
  STD_TORCH_CHECK(tiles * plan.parts <= INT32_MAX, "pumice::int4_linear: a product of ", product.m,
                  " x ", product.weight.n, " outputs is too large for one launch");
  const IntnWeight& weight = product.weight;
  Int4Grid grid;
  grid.tiles_m = static_cast<int>(blocks_along(product.m, Tile::kTokens));
  grid.tiles_n = static_cast<int>(blocks_along(weight.n, Tile::kRows));
  grid.parts = plan.parts;
  grid.slices = static_cast<int>(blocks_along(weight.k, Tile::kSliceK));
  grid.m = static_cast<int>(product.m);
  grid.n = static_cast<int>(weight.n);
  grid.words = static_cast<int>(intn_words(weight.k, 4));
  grid.token_stride = static_cast<int>(product.tokens.stride);
  grid.groups = static_cast<int>(weight.groups);
  grid.group_size = static_cast<int>(weight.group_size);
  grid.terms_per_warp =
      weight.groups == 1 || weight.group_size % kInt4WarpK == 0 ? 1 : kInt4WarpK / kInt4ChunkK;
  grid.weights_aligned =
      reinterpret_cast<uintptr_t>(weight.qweight) % 16 == 0 && grid.words % 4 == 0;
  launch(int4_gemm_kernel<T, Tile, kGeneral>, dim3(static_cast<unsigned>(tiles * plan.parts)),
         dim3(Tile::kThreads), Tile::kSharedBytes, stream, product, grid);
}

// By the tile of the plan.
template <class T>
void launch_int4_gemm_16bit(const Int4Product& product, const Int4Plan& plan, cudaStream_t stream) {
  if (int4_is_general(product.weight)) {
    return plan.tile == Int4TileName::k8
               ? launch_int4_gemm<T, Int4Tile8, true>(product, plan, stream)
               : launch_int4_gemm<T, Int4TileCompact, true>(product, plan, stream);
  }
  switch (plan.tile) {
    case Int4TileName::kNarrow:
      return launch_int4_gemm<T, Int4TileNarrow, false>(product, plan, stream);
    case Int4TileName::k8:
      return launch_int4_gemm<T, Int4Tile8, false>(product, plan, stream);
    case Int4TileName::k16:
      return launch_int4_gemm<T, Int4Tile16, false>(product, plan, stream);
    case Int4TileName::k32:
      return launch_int4_gemm<T, Int4Tile32, false>(product, plan, stream);
    case Int4TileName::k64:
      return launch_int4_gemm<T, Int4Tile64, false>(product, plan, stream);
    case Int4TileName::k128:
      return launch_int4_gemm<T, Int4Tile128, false>(product, plan, stream);
    case Int4TileName::kCompact:
      return launch_int4_gemm<T, Int4TileCompact, false>(product, plan, stream);
  }
}

}  // namespace pumice::cuda
