// Where a kernel finds the keys and values of one head of one sequence, by the number of the key.
// A source has the kernel's argument, a function that makes it, and two that copy: paged_source.h
// has another.
#pragma once

#include "cuda/attention/flash_schedule.h"
#include "cuda/attention/shared_tile.h"
#include "cuda/ptx/thread.h"

namespace pumice::cuda {

// At a constant distance from each other.
struct ContiguousKeys {
  using Call = FlashForward;

  // How a tile of them lies in shared memory.
  template <class T, int kRows, int kColumns>
  using Tile = SharedTile<kRows, kColumns>;

  const unsigned char *keys, *values;
  int64_t key_stride, value_stride;  // bytes

  static __device__ __forceinline__ ContiguousKeys of(const FlashForward& call,
                                                      const FlashSequence& sequence, int kv_head) {
    const AttentionProblem& problem = call.problem;
    const int64_t size = problem.dtype == DType::kFloat32 ? 4 : 2;
    const auto first = [&](const TokenView& view) {
      return static_cast<const unsigned char*>(view.data) +
             size * token_offset(view, sequence.batch, sequence.k_begin, 0, kv_head);
    };
    return {first(problem.key), first(problem.value), size * problem.key.token_stride,
            size * problem.value.token_stride};
  }

  // Where key or value j begins.
  __device__ __forceinline__ const unsigned char* key(int j) const { return keys + j * key_stride; }
  __device__ __forceinline__ const unsigned char* value(int j) const {
    return values + j * value_stride;
  }

  // An element of what key() and value() find, in fp32.
  static __device__ __forceinline__ float key_element(const unsigned char* row, int column) {
    return reinterpret_cast<const float*>(row)[column];
  }
  static __device__ __forceinline__ float value_element(const unsigned char* row, int column) {
    return reinterpret_cast<const float*>(row)[column];
  }
  // What products of tiles with keys, and sums of those with values, are to be multiplied by.
  static __device__ __forceinline__ float softmax_scale(const FlashForward& call) {
    return call.problem.score.softmax_scale;
  }
  static __device__ __forceinline__ float value_scale() { return 1.0f; }

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

}  // namespace pumice::cuda
