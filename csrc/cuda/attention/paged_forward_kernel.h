// kernel flash_forward with keys and values in a paged cache, and queries in 16 bit: the main loop
// of contiguous ones (flash_forward_kernel.h), and where the cache is of the query's type the tiles
// too, so that results have the same bits.
#pragma once

#include "cuda/attention/flash_forward_kernel.h"
#include "cuda/attention/paged_source.h"

namespace pumice::cuda {

template <class T>
void launch_paged_forward_16bit(const PagedForward& call, int64_t blocks, cudaStream_t stream) {
  const int64_t head_dim = call.problem.head_dim, value_dim = call.problem.value_dim;
  const int64_t larger_dim = std::max(head_dim, value_dim);
  const auto launch_tile = [&]<class Tile>(Tile) {
    launch_flash_forward<T, Tile, PagedKeys>(call, blocks, stream);
  };
  if (call.plan.tile_rows == kFlashShortRows) {
    if (larger_dim <= 64) return launch_tile(FlashShort64{});
    if (larger_dim <= 128) return launch_tile(FlashShort128{});
    return launch_tile(FlashShort256{});
  }
  if (larger_dim <= 64) return launch_tile(FlashTile64{});
  if (larger_dim <= 96) return launch_tile(FlashTile96{});
  if (larger_dim <= 128) return launch_tile(FlashTile128{});
  if (head_dim <= 192 && value_dim <= 128) return launch_tile(FlashTile192{});
  return launch_tile(FlashTile256{});
}

// A cache of bytes.
template <class T, CacheType kType>
void launch_paged_forward_bytes(const PagedForward& call, int64_t blocks, cudaStream_t stream) {
  const int64_t head_dim = call.problem.head_dim, value_dim = call.problem.value_dim;
  const int64_t larger_dim = std::max(head_dim, value_dim);
  const auto launch_tile = [&]<class Tile>(Tile) {
    launch_flash_forward<T, Tile, PagedBytes<kType>>(call, blocks, stream);
  };
  if (call.plan.tile_rows == kFlashShortRows) {
    if (larger_dim <= 64) return launch_tile(FlashBytesShort64{});
    if (larger_dim <= 128) return launch_tile(FlashBytesShort128{});
    return launch_tile(FlashBytesShort256{});
  }
  if (larger_dim <= 64) return launch_tile(FlashBytes64{});
  if (larger_dim <= 128) return launch_tile(FlashBytes128{});
  if (head_dim <= 192 && value_dim <= 128) return launch_tile(FlashBytes192{});
  return launch_tile(FlashBytes256{});
}

}  // namespace pumice::cuda
