// What the blocks and warps of int4_gemm and sparse24_gemm do alike: the weights are the A operand
// of the tensor cores (16 rows of N), the tokens the B operand (8 of them). A Tile has the names of
// Int4Tile and Sparse24Tile.
#pragma once

#include "cuda/device.h"
#include "cuda/gemm/tile_plan.h"

namespace pumice::cuda {

// Tiles in bands of 8 along M, so that the blocks that run at the same time need the fewest
// different rows of x and weights, which then come from L2.
struct TileOrder {
  int tiles_m, tiles_n;

  static constexpr int kBand = 8;
  __device__ __forceinline__ void locate(int tile, int& tile_m, int& tile_n) const {
    const int first_m = tile / (kBand * tiles_n) * kBand;
    const int band = min(tiles_m - first_m, kBand);
    tile_m = first_m + tile % (kBand * tiles_n) % band;
    tile_n = tile % (kBand * tiles_n) / band;
  }
};

// A warp's place in the tile.
template <class Tile>
struct WarpPlace {
  int warp_k, row, token;
  __device__ __forceinline__ WarpPlace() {
    constexpr int kWarpsOfTile = Tile::kWarpsRows * Tile::kWarpsTokens;
    warp_k = warp_index() / kWarpsOfTile;
    row = warp_index() % kWarpsOfTile / Tile::kWarpsTokens * Tile::kWarpRows;
    token = warp_index() % Tile::kWarpsTokens * Tile::kWarpTokens;
  }
};

// The sums of a warp to shared memory, [warp of K][token][row].
template <class Tile, class Sum>
__device__ __forceinline__ void store_warp_sums(
    Sum* sums, const Sum (&sum)[Tile::kRowTiles][Tile::kTokenTiles][4],
    const WarpPlace<Tile>& place) {
  const int group = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int r = 0; r < Tile::kRowTiles; ++r) {
#pragma unroll
    for (int j = 0; j < Tile::kTokenTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int row = place.row + r * 16 + c / 2 * 8 + group;
        const int token = place.token + j * 8 + 2 * t + c % 2;
        sums[(place.warp_k * Tile::kTokens + token) * Tile::kSumStride + row] = sum[r][j][c];
      }
    }
  }
}

// Sums of products of integers, exact within a group of weights that share a scale, and the scaled
// sums of all groups.
template <class Tile>
struct GroupSums {
  float all[Tile::kRowTiles][Tile::kTokenTiles][4] = {};
  float group[Tile::kRowTiles][Tile::kTokenTiles][4] = {};

  // Ends a group. `scales` are those of the rows from this lane's first row on.
  __device__ __forceinline__ void add_scaled(const float* scales) {
#pragma unroll
    for (int r = 0; r < Tile::kRowTiles; ++r) {
      const float scale[2] = {scales[r * 16], scales[r * 16 + 8]};
#pragma unroll
      for (int j = 0; j < Tile::kTokenTiles; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          all[r][j][c] += group[r][j][c] * scale[c / 2];
          group[r][j][c] = 0.0f;
        }
      }
    }
  }
};

// A thread's scales and zero points of a slice, between global and shared memory.
template <class Tile>
struct PendingTerms {
  static constexpr int kCount = std::max((Tile::kTerms + Tile::kThreads - 1) / Tile::kThreads, 1);
  float scales[kCount];
  uint8_t zeros[kCount];

  // To a stage that holds `terms` of each.
  __device__ __forceinline__ void store(unsigned char* stage, int terms) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int term = static_cast<int>(threadIdx.x) + i * Tile::kThreads;
      if (term >= terms) break;
      reinterpret_cast<float*>(stage + Tile::kScaleOffset)[term] = scales[i];
      stage[Tile::kZeroOffset + term] = zeros[i];
    }
  }
};

// Where `parts` blocks leave their sums of a tile in global memory: whether this block, which has
// written its own, is the last to do so, and may now read all of them. `ticket` is zero at the
// launch; `shared` is a word of shared memory.
__device__ __forceinline__ bool takes_last_ticket(uint32_t* ticket, int parts, uint32_t* shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *shared = atomicAdd(ticket, 1u);
  __syncthreads();
  if (*shared != static_cast<uint32_t>(parts - 1)) return false;
  __threadfence();
  return true;
}

}  // namespace pumice::cuda
