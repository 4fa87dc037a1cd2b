// kernel: sparse24_gemm
//
// y = x·Wᵀ + bias for 2:4 weights and any M: the weights are the sparse A operand of mma.sp (16
// rows of N), the tokens its B operand (8 of them), so that few tokens waste little. Slices of K
// run through a ring of stages in shared memory (sparse24_slices.h); warps multiply them
// (sparse24_warp.h, sparse24_int4_warp.h).
//
// At the end the warps' sums are added in shared memory in a fixed order. Where K is cut into
// parts, blocks leave their sums in global memory, and the one that takes the last ticket of a tile
// adds all parts, also in a fixed order: the result does not depend on who was last.
#pragma once

#include "cuda/gemm/int8_epilogue.h"
#include "cuda/launch.h"
#include "cuda/ptx/store.h"
#include "cuda/sparse/sparse24_slices.h"

namespace pumice::cuda {

constexpr int kSparse24Neighbours = 8;  // outputs of a token that a thread finishes

// Neighbouring outputs of token m from row n on: scales, bias, cast; one or two stores of 16 bytes
// where the rows of y are on such boundaries.
template <Sparse24Kind kKind, class Sum>
__device__ __forceinline__ void store_sparse24_outputs(const Sparse24Product& product, int m, int n,
                                                       const Sum (&sums)[kSparse24Neighbours]) {
  float y[kSparse24Neighbours];
#pragma unroll
  for (int i = 0; i < kSparse24Neighbours; ++i) {
    y[i] = static_cast<float>(sums[i]);
    if (n + i >= product.n) continue;
    if constexpr (kKind == Sparse24Kind::kInt8) {
      y[i] = y[i] * product.token_scale[m * product.token_scale_stride] *
             product.weight_scale[(n + i) * product.weight_scale_stride];
    }
    y[i] += element_or_zero(product.bias, n + i);
  }
  const int64_t at = static_cast<int64_t>(m) * product.y_stride + n;
  if (product.y_stride % kSparse24Neighbours != 0) {
#pragma unroll
    for (int i = 0; i < kSparse24Neighbours; ++i) {
      if (n + i < product.n) store_element(product.y, product.y_dtype, at + i, y[i]);
    }
    return;
  }
  const auto store_16bit = [&](auto element) {
    using T = decltype(element);
    ptx::store_16(static_cast<T*>(product.y) + at,
                  {pack_pair<T>(y[0], y[1]), pack_pair<T>(y[2], y[3]), pack_pair<T>(y[4], y[5]),
                   pack_pair<T>(y[6], y[7])});
  };
  switch (product.y_dtype) {
    case DType::kFloat16:
      return store_16bit(__half{});
    case DType::kBFloat16:
      return store_16bit(__nv_bfloat16{});
    default:
      auto* vectors = reinterpret_cast<float4*>(static_cast<float*>(product.y) + at);
      vectors[0] = {y[0], y[1], y[2], y[3]};
      vectors[1] = {y[4], y[5], y[6], y[7]};
  }
}

template <class Warp, class Tile, bool kAligned>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    sparse24_gemm_kernel(const __grid_constant__ Sparse24Product product,
                         const __grid_constant__ Sparse24Grid grid) {
  using Sum = typename Warp::Sum;
  unsigned char* stages = dynamic_shared_memory<unsigned char>();
  const int tile = static_cast<int>(blockIdx.x) / grid.parts;
  const int part = static_cast<int>(blockIdx.x) % grid.parts;
  int tile_m, tile_n;
  grid.locate(tile, tile_m, tile_n);
  // What only the end needs waits in shared memory: the main loop needs all registers.
  struct alignas(16) Tail {
    int m0, n0;
    uint32_t ticket;
  };
  Tail& tail = *reinterpret_cast<Tail*>(stages + Tile::kTailOffset);
  if (threadIdx.x == 0) {
    tail.m0 = tile_m * Tile::kTokens;
    tail.n0 = tile_n * Tile::kRows;
  }
  const int begin = static_cast<int>(static_cast<int64_t>(part) * grid.slices / grid.parts);
  const int end = static_cast<int>(static_cast<int64_t>(part + 1) * grid.slices / grid.parts);

  Sparse24SliceLoader<Tile, kAligned> loader(product, grid, stages, tile_m * Tile::kTokens,
                                             tile_n * Tile::kRows, begin, end);
#pragma unroll 1
  for (int i = 0; i < Tile::kStages - 1; ++i) {
    loader.start(i);
    loader.finish(i);
  }
  Warp warp(product, grid);
  warp.multiply(loader, stages, begin, end);
  ptx::cp_async_wait<0>();
  __syncthreads();
  Sum* sums = dynamic_shared_memory<Sum>();
  warp.store_sums(sums);
  __syncthreads();

  constexpr int kOutputs = Tile::kRows * Tile::kTokens;
  constexpr int kEights = kOutputs / kSparse24Neighbours;
  const auto add = [](Sum(&total)[kSparse24Neighbours], const Sum* at) {
    struct alignas(16) Four {
      Sum value[4];
    };
#pragma unroll
    for (int v = 0; v < kSparse24Neighbours / 4; ++v) {
      const Four four = reinterpret_cast<const Four*>(at)[v];
#pragma unroll
      for (int i = 0; i < 4; ++i) total[4 * v + i] += four.value[i];
    }
  };
  // Eight neighbouring rows of a token.
  const auto total_of = [&](int i, Sum(&total)[kSparse24Neighbours]) {
    const int row = i * kSparse24Neighbours % Tile::kRows;
    const int token = i * kSparse24Neighbours / Tile::kRows;
#pragma unroll
    for (int w = 0; w < Tile::kWarpsK; ++w) {
      add(total, sums + (w * Tile::kTokens + token) * Tile::kSumStride + row);
    }
  };
  const int m0 = tail.m0, n0 = tail.n0;
  const auto finish = [&](int i, const Sum(&total)[kSparse24Neighbours]) {
    const int m = m0 + i * kSparse24Neighbours / Tile::kRows;
    const int n = n0 + i * kSparse24Neighbours % Tile::kRows;
    if (m < grid.m && n < grid.n) store_sparse24_outputs<Tile::kKind>(product, m, n, total);
  };
  const int thread = static_cast<int>(threadIdx.x);
  if (grid.parts == 1) {
    for (int i = thread; i < kEights; i += Tile::kThreads) {
      Sum total[kSparse24Neighbours] = {};
      total_of(i, total);
      finish(i, total);
    }
    return;
  }
  Sum* partial =
      static_cast<Sum*>(product.partial_sums) + static_cast<int64_t>(tile) * grid.parts * kOutputs;
  for (int i = thread; i < kEights; i += Tile::kThreads) {
    Sum total[kSparse24Neighbours] = {};
    total_of(i, total);
    Sum* at = partial + static_cast<int64_t>(part) * kOutputs + i * kSparse24Neighbours;
#pragma unroll
    for (int v = 0; v < kSparse24Neighbours; v += 4) {
      ptx::store_16(at + v, {bits_as<uint32_t>(total[v]), bits_as<uint32_t>(total[v + 1]),
                             bits_as<uint32_t>(total[v + 2]), bits_as<uint32_t>(total[v + 3])});
    }
  }
  if (!takes_last_ticket(product.tickets + tile, grid.parts, &tail.ticket)) return;
  for (int i = thread; i < kEights; i += Tile::kThreads) {
    Sum total[kSparse24Neighbours] = {};
    for (int p = 0; p < grid.parts; ++p) {
      add(total, partial + static_cast<int64_t>(p) * kOutputs + i * kSparse24Neighbours);
    }
    finish(i, total);
  }
}

template <class Warp, class Tile, bool kAligned>
void launch_sparse24_gemm(const Sparse24Product& product, const Sparse24Plan& plan,
                          cudaStream_t stream) {
  Sparse24Grid grid{};
  grid.tiles_m = static_cast<int>(blocks_along(product.m, Tile::kTokens));
  grid.tiles_n = static_cast<int>(blocks_along(product.n, Tile::kRows));
  grid.parts = plan.parts;
  grid.slices = static_cast<int>(blocks_along(product.k, Tile::kSliceK));
  const int64_t blocks = static_cast<int64_t>(grid.tiles_m) * grid.tiles_n * grid.parts;
  STD_TORCH_CHECK(blocks <= INT32_MAX, "pumice: a 2:4 product of ", product.m, " × ", product.n,
                  " outputs is too large for one launch");
  grid.m = static_cast<int>(product.m);
  grid.n = static_cast<int>(product.n);
  grid.value_bytes = static_cast<int>(sparse24_value_row_bytes<Tile::kKind>(product.k));
  grid.meta_bytes = static_cast<int>(sparse24_meta_bytes(product.k));
  grid.token_bytes = static_cast<int>(sparse24_token_row_bytes<Tile::kKind>(product.k));
  grid.meta_aligned = rows_are_aligned_16(product.meta, grid.meta_bytes);
  if constexpr (Tile::kKind == Sparse24Kind::kInt4) {
    const IntnWeight& kept = product.kept;
    constexpr int kChunks = Tile::kWarpK / kSparse24ChunkK;
    const int64_t chunks = blocks_along(product.k, kSparse24ChunkK);
    grid.groups = static_cast<int>(kept.groups);
    grid.group_chunks =
        static_cast<int>(kept.groups == 1 ? chunks : kept.group_size / (kSparse24ChunkK / 2));
    grid.group_reciprocal =
        static_cast<uint32_t>(((int64_t{1} << 32) + grid.group_chunks - 1) / grid.group_chunks);
    static_assert(kChunks == 2);
    grid.terms_shift = kept.groups == 1 || grid.group_chunks % kChunks == 0 ? 0 : 1;
    grid.terms_of_slice = (Tile::kRows * Tile::kWarpsK) << grid.terms_shift;
  }
  launch(sparse24_gemm_kernel<Warp, Tile, kAligned>, dim3(static_cast<unsigned>(blocks)),
         dim3(Tile::kThreads), Tile::kSharedBytes, stream, product, grid);
}

}  // namespace pumice::cuda
