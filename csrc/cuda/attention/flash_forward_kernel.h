// kernel flash_forward: out = softmax(scores)·value for a tile of rows, in 16 bit; flash_tiles.h
// has the tiles and what they are expected to reach, flash_mainloop.h how it is done.
#pragma once

#include "cuda/attention/flash_epilogue.h"
#include "cuda/attention/flash_forward.h"
#include "cuda/attention/flash_outside.h"
#include "cuda/launch.h"

namespace pumice::cuda {

template <class T, class Tile, class Source>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    flash_forward_kernel(const __grid_constant__ typename Source::Call call) {
  store_outside<T>(call);
  using Block = FlashBlock<Source>;
  static_assert(sizeof(Block) <= Tile::kBlockBytes);
  auto* shared = dynamic_shared_memory<unsigned char>();
  auto* block = reinterpret_cast<Block*>(shared + Tile::kBlockOffset);
  if (threadIdx.x == 0) {
    const FlashWork work(call);
    block->work.exists = work.exists;
    if (work.exists) {
      const int kv_head = work.head0 / static_cast<int>(call.problem.group());
      *block = Block(call, work, Source::of(call, work.sequence, kv_head), Tile::kKeys);
    }
  }
  __syncthreads();
  const FlashWork& work = block->work;
  if (!work.exists) return;
  FlashMainloop<T, Tile, Source> mainloop(call, *block, shared);
  mainloop.run();
  if constexpr (Tile::kWarpsKeys == 1) {
    store_rows<T, Tile>(call, work, mainloop, shared);
  } else {
    merge_and_store_rows<T, Tile>(call, work, mainloop, shared);
  }
}

template <class T, class Tile, class Source = ContiguousKeys>
void launch_flash_forward(const typename Source::Call& call, int64_t blocks, cudaStream_t stream) {
  launch(flash_forward_kernel<T, Tile, Source>, dim3(static_cast<unsigned>(blocks)),
         dim3(Tile::kThreads), Tile::kSharedBytes, stream, call);
}

// By the head dims, and by how many rows the plan's tiles have.
template <class T>
void launch_flash_forward_16bit(const FlashForward& call, int64_t blocks, cudaStream_t stream) {
  const int64_t head_dim = call.problem.head_dim, value_dim = call.problem.value_dim;
  const int64_t larger_dim = std::max(head_dim, value_dim);
  if (call.plan.tile_rows == kFlashShortRows) {
    if (larger_dim <= 64) return launch_flash_forward<T, FlashShort64>(call, blocks, stream);
    if (larger_dim <= 128) return launch_flash_forward<T, FlashShort128>(call, blocks, stream);
    return launch_flash_forward<T, FlashShort256>(call, blocks, stream);
  }
  if (larger_dim <= 64) return launch_flash_forward<T, FlashTile64>(call, blocks, stream);
  if (larger_dim <= 96) return launch_flash_forward<T, FlashTile96>(call, blocks, stream);
  if (larger_dim <= 128) return launch_flash_forward<T, FlashTile128>(call, blocks, stream);
  if (head_dim <= 192 && value_dim <= 128) {
    return launch_flash_forward<T, FlashTile192>(call, blocks, stream);
  }
  return launch_flash_forward<T, FlashTile256>(call, blocks, stream);
}

}  // namespace pumice::cuda
