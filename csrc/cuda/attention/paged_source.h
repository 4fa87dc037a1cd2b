// Where a kernel finds the keys and values of one head of one sequence in a paged cache: key j is
// in block table[j / block_size], at slot j % block_size.
//
// The lanes that copy one row look up one entry of the table, and a tile of 64 keys four blocks of
// 16: entries come from L1, a line of them serves 512 keys. An entry that is no block of the cache,
// as those of blocks that no query sees may be, leads nowhere: such keys become zero.
#pragma once

#include "cuda/attention/paged_forward.h"
#include "cuda/attention/shared_tile.h"
#include "cuda/ptx/thread.h"

namespace pumice::cuda {

struct PagedKeys {
  using Call = PagedForward;

  struct Slots {
    const unsigned char* first;         // block 0, slot 0
    int64_t block_stride, slot_stride;  // bytes
  };
  Slots keys, values;
  const int32_t* table;
  int32_t blocks;  // of the cache
  int32_t block_size;
  BlockDivision block_of;
  int32_t k_len;

  static __device__ __forceinline__ PagedKeys of(const PagedForward& call,
                                                 const FlashSequence& sequence, int kv_head) {
    const PagedCache& cache = call.cache;
    const int64_t size = call.problem.dtype == DType::kFloat32 ? 4 : 2;
    const auto slots = [&](const CacheView& view) {
      return Slots{static_cast<const unsigned char*>(view.data) + size * view.at(0, 0, kv_head),
                   size * view.block_stride, size * view.slot_stride};
    };
    return {slots(cache.key),
            slots(cache.value),
            cache.block_table + sequence.batch * cache.max_blocks,
            static_cast<int32_t>(cache.num_blocks < INT32_MAX ? cache.num_blocks : INT32_MAX),
            cache.block_size,
            call.block_of,
            sequence.k_len};
  }

  // Where key or value j < k_len begins; null if its block does not exist.
  __device__ __forceinline__ const unsigned char* key(int j) const { return find(keys, j); }
  __device__ __forceinline__ const unsigned char* value(int j) const { return find(values, j); }

  template <class Tile, int kThreads>
  __device__ __forceinline__ void copy_keys(unsigned char* tile, int j, int /*rows*/,
                                            int columns) const {
    copy<Tile, kThreads>(keys, tile, j, columns);
  }
  template <class Tile, int kThreads>
  __device__ __forceinline__ void copy_values(unsigned char* tile, int j, int /*rows*/,
                                              int columns) const {
    copy<Tile, kThreads>(values, tile, j, columns);
  }

 private:
  __device__ __forceinline__ const unsigned char* find(const Slots& slots, int j) const {
    const int n = block_of(j);
    const int block = table[n];
    if (block < 0 || block >= blocks) return nullptr;
    return slots.first + block * slots.block_stride + (j - n * block_size) * slots.slot_stride;
  }

  template <class Tile, int kThreads>
  __device__ __forceinline__ void copy(const Slots& slots, unsigned char* tile, int j0,
                                       int columns) const {
    Tile::template copy_found<kThreads>(tile, ptx::thread_index_here(), columns,
                                        [&](int r) -> const unsigned char* {
                                          return j0 + r < k_len ? find(slots, j0 + r) : nullptr;
                                        });
  }
};

}  // namespace pumice::cuda
