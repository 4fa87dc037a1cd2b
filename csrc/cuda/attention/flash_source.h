// Where a kernel finds the keys and values of one head of one sequence, by the number of the key.
// Another source (a block table) needs only the same two functions, with SharedTile::copy.
#pragma once

#include "cuda/attention/flash_layout.h"
#include "cuda/attention/shared_tile.h"
#include "cuda/ptx/thread.h"

namespace pumice::cuda {

// At a constant distance from each other.
struct ContiguousKeys {
  const unsigned char *keys, *values;
  int64_t key_stride, value_stride;  // bytes

  // Starts the copies of keys or values j .. of `rows` that there are from j on.
  template <class Tile, int kThreads>
  __device__ __forceinline__ void copy_keys(unsigned char* tile, int j, int rows,
                                            int columns) const {
    Tile::template copy_strided<kThreads>(tile, ptx::thread_index_here(), rows, columns,
                                          keys + j * key_stride, key_stride);
  }
  template <class Tile, int kThreads>
  __device__ __forceinline__ void copy_values(unsigned char* tile, int j, int rows,
                                              int columns) const {
    Tile::template copy_strided<kThreads>(tile, ptx::thread_index_here(), rows, columns,
                                          values + j * value_stride, value_stride);
  }
};

__device__ __forceinline__ ContiguousKeys contiguous_keys(const AttentionProblem& problem,
                                                          const FlashSequence& sequence,
                                                          int kv_head) {
  const int64_t size = problem.dtype == DType::kFloat32 ? 4 : 2;
  const auto first = [&](const TokenView& view) {
    return static_cast<const unsigned char*>(view.data) +
           size * token_offset(view, sequence.batch, sequence.k_begin, 0, kv_head);
  };
  return {first(problem.key), first(problem.value), size * problem.key.token_stride,
          size * problem.value.token_stride};
}

}  // namespace pumice::cuda
