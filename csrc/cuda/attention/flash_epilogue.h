// The end of a tile: quotients, sinks, lse; the result in 16 bit, or, of a part of the keys, in
// fp32.
#pragma once

#include "cuda/attention/flash_mainloop.h"
#include "cuda/ptx/store.h"

namespace pumice::cuda {

// Writes columns 8·chunk .. + 7, those that exist.
template <class T>
__device__ __forceinline__ void store_chunk(T* row, int chunk, int columns, const uint4& eight) {
  if (columns % 8 == 0) {
    ptx::store_16(row + chunk * 8, eight);
    return;
  }
  const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (chunk * 8 + i < columns) {
      row[chunk * 8 + i] = bits_as<T>(static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16)));
    }
  }
}

template <class T>
class FlashEpilogue {
 public:
  __device__ __forceinline__ FlashEpilogue(const FlashForward& call, const FlashWork& work)
      : call_(call), work_(work), value_dim_(static_cast<int>(call.problem.value_dim)) {}

  // Row r of the tile ends; `writes` for one of the threads that ask.
  __device__ __forceinline__ FlashRowEnd end_row(int r, float reference, float sum,
                                                 bool writes) const {
    const int pack = call_.plan.pack;
    const bool whole = work_.parts == 1;
    float sink = -INFINITY;
    // The sink joins once: with parts, when they are merged.
    if (whole && r < work_.rows && call_.problem.score.sinks != nullptr) {
      sink = call_.problem.score.sinks[work_.head(r, pack)] * kLog2E;
    }
    const FlashRowEnd end = finish_row(reference, sum, sink);
    if (writes && r < work_.rows) {
      float* lse = whole ? call_.lse + lse_offset(call_.problem, work_.sequence,
                                                  work_.query(r, pack), work_.head(r, pack))
                         : call_.partial_lse + work_.partial_row(call_.plan, r);
      *lse = end.lse;
    }
    return end;
  }

  __device__ __forceinline__ void store(int r, int chunk, const uint4& eight) const {
    const int pack = call_.plan.pack;
    if (r >= work_.rows || chunk * 8 >= value_dim_) return;
    T* row = static_cast<T*>(call_.out) + result_offset(call_.problem, work_.sequence,
                                                        work_.query(r, pack), work_.head(r, pack),
                                                        value_dim_);
    store_chunk(row, chunk, value_dim_, eight);
  }

  // Where a part's row r goes, flash_partial_columns() of it; null if there is no such row.
  __device__ __forceinline__ float* partial(int r) const {
    if (r >= work_.rows) return nullptr;
    return call_.partial_out + work_.partial_row(call_.plan, r) * flash_partial_columns(value_dim_);
  }
  // Columns from `column`, a multiple of the vector's size.
  template <class Vector>
  __device__ __forceinline__ void store_partial(float* row, int column,
                                                const Vector& values) const {
    if (row == nullptr || column >= flash_partial_columns(value_dim_)) return;
    *reinterpret_cast<Vector*>(row + column) = values;
  }

 private:
  const FlashForward& call_;
  const FlashWork& work_;
  int value_dim_;
};

// Warps along the queries: each has its rows' sums, and stores them by way of shared memory, so
// that a row leaves in pieces of 16 bytes.
template <class T, class Tile, class Mainloop>
__device__ __forceinline__ void store_rows(const FlashForward& call, const FlashWork& work,
                                           const Mainloop& mainloop, unsigned char* shared) {
  using Shared = SharedTile<Tile::kRows, Tile::kValueDim>;
  const FlashEpilogue<T> epilogue(call, work);
  const ThreadPlace<Tile> place;
  const int t = place.lane % 4;
  const float scale = mainloop.softmax_scale();
  __syncthreads();  // all have read the queries
#pragma unroll
  for (int r = 0; r < 2 * Tile::kRowTiles; ++r) {
    const int row = place.row(r);
    const FlashRowEnd end = epilogue.end_row(row, mainloop.softmax().reference(r, scale),
                                             mainloop.softmax().sum(r), t == 0);
    const float factor = end.factor * mainloop.value_scale();
    float* partial = work.parts > 1 ? epilogue.partial(row) : nullptr;
#pragma unroll
    for (int v = 0; v < Tile::kValueTiles; ++v) {
      const float2 sums = mainloop.pair(r / 2, v, r % 2);
      const float x = sums.x * factor, y = sums.y * factor;
      const int column = mainloop.column(v, t);
      if (work.parts == 1) {
        *reinterpret_cast<uint32_t*>(shared + Shared::offset(row, column / 8) + column % 8 * 2) =
            pack_pair<T>(x, y);
      } else {
        epilogue.store_partial(partial, column, float2{x, y});
      }
    }
  }
  if (work.parts > 1) return;
  __syncwarp();
#pragma unroll 1
  for (int i = place.lane; i < Tile::kWarpRows * Shared::kChunks; i += kWarpSize) {
    const int row = place.warp_row + i / Shared::kChunks, chunk = i % Shared::kChunks;
    epilogue.store(row, chunk,
                   *reinterpret_cast<const uint4*>(shared + Shared::offset(row, chunk)));
  }
}

// Warps along the keys: each has sums of all rows over its keys, which are brought to one reference
// and added in the order of the warps.
template <class T, class Tile, class Mainloop>
__device__ __forceinline__ void merge_and_store_rows(const FlashForward& call,
                                                     const FlashWork& work,
                                                     const Mainloop& mainloop,
                                                     unsigned char* shared) {
  static_assert(Tile::kWarpsRows == 1 && Tile::kRowTiles == 1);
  const FlashEpilogue<T> epilogue(call, work);
  auto* ends = reinterpret_cast<float2*>(shared);                     // [warp][row]: m, l
  auto* sums = reinterpret_cast<float*>(shared + Tile::kRingOffset);  // [warp][row][value]
  const ThreadPlace<Tile> place;
  const float scale = mainloop.softmax_scale();
  __syncthreads();  // all have read the queries and the last tiles
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = place.row(r);
    const float sum = mainloop.softmax().sum(r);
    if (lane_index() % 4 == 0) {
      ends[warp_index() * Tile::kRows + row] = {mainloop.softmax().reference(r, scale), sum};
    }
  }
  __syncthreads();
  const auto reference_of = [&](int row) {
    float reference = -INFINITY;
#pragma unroll
    for (int w = 0; w < Tile::kWarpsKeys; ++w) {
      reference = fmaxf(reference, ends[w * Tile::kRows + row].x);
    }
    return reference;
  };
  const auto factor_of = [](float of_warp, float reference) {
    return of_warp == -INFINITY ? 0.0f : ptx::exp2_approx(of_warp - reference);
  };
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = place.row(r);
    const float factor = factor_of(ends[warp_index() * Tile::kRows + row].x, reference_of(row));
#pragma unroll
    for (int v = 0; v < Tile::kValueTiles; ++v) {
      const float2 pair = mainloop.pair(0, v, r);
      *reinterpret_cast<float2*>(sums + (warp_index() * Tile::kRows + row) * Tile::kValueDim +
                                 mainloop.column(v, lane_index() % 4)) = {pair.x * factor,
                                                                          pair.y * factor};
    }
  }
  __syncthreads();
  constexpr int kChunks = Tile::kValueDim / 8;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kRows * kChunks; i += Tile::kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    if (row >= work.rows) break;
    const float reference = reference_of(row);
    float sum = 0.0f, values[8] = {};
#pragma unroll
    for (int w = 0; w < Tile::kWarpsKeys; ++w) {
      const float2 end = ends[w * Tile::kRows + row];
      sum += end.y * factor_of(end.x, reference);
      const auto* of_warp = reinterpret_cast<const float4*>(
          sums + (w * Tile::kRows + row) * Tile::kValueDim + chunk * 8);
      const float4 low = of_warp[0], high = of_warp[1];
      values[0] += low.x, values[1] += low.y, values[2] += low.z, values[3] += low.w;
      values[4] += high.x, values[5] += high.y, values[6] += high.z, values[7] += high.w;
    }
    const float factor =
        epilogue.end_row(row, reference, sum, chunk == 0).factor * mainloop.value_scale();
#pragma unroll
    for (float& value : values) value *= factor;
    if (work.parts == 1) {
      epilogue.store(row, chunk,
                     {pack_pair<T>(values[0], values[1]), pack_pair<T>(values[2], values[3]),
                      pack_pair<T>(values[4], values[5]), pack_pair<T>(values[6], values[7])});
    } else {
      float* partial = epilogue.partial(row);
      epilogue.store_partial(partial, chunk * 8,
                             float4{values[0], values[1], values[2], values[3]});
      epilogue.store_partial(partial, chunk * 8 + 4,
                             float4{values[4], values[5], values[6], values[7]});
    }
  }
}

}  // namespace pumice::cuda
