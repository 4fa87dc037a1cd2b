// Where a kernel finds the keys and values of one head of one sequence in a paged cache: key j is
// in block table[j / block_size], at slot j % block_size.
//
// The lanes that copy one row look up one entry of the table, and a tile of 64 keys four blocks of
// 16: entries come from L1, a line of them serves 512 keys. An entry that is no block of the cache,
// as those of blocks that no query sees may be, leads nowhere: such keys become zero.
#pragma once

#include "cuda/attention/cache_tile.h"
#include "cuda/attention/paged_forward.h"
#include "cuda/ptx/thread.h"

namespace pumice::cuda {

class PagedRows {
 public:
  using Call = PagedForward;

  // Where key or value j < k_len begins; null if its block does not exist.
  __device__ __forceinline__ const unsigned char* key(int j) const { return find(keys_, j); }
  __device__ __forceinline__ const unsigned char* value(int j) const { return find(values_, j); }

  template <class Tile, int kThreads>
  __device__ __forceinline__ void copy_keys(unsigned char* tile, int j, int /*rows*/,
                                            int columns) const {
    copy<Tile, kThreads>(keys_, tile, j, columns);
  }
  template <class Tile, int kThreads>
  __device__ __forceinline__ void copy_values(unsigned char* tile, int j, int /*rows*/,
                                              int columns) const {
    copy<Tile, kThreads>(values_, tile, j, columns);
  }

 protected:
  // With elements of `size` bytes.
  __device__ __forceinline__ PagedRows(const PagedForward& call, const FlashSequence& sequence,
                                       int kv_head, int64_t size)
      : table_(call.cache.block_table + sequence.batch * call.cache.max_blocks),
        blocks_(static_cast<int32_t>(call.cache.num_blocks < INT32_MAX ? call.cache.num_blocks
                                                                       : INT32_MAX)),
        block_size_(call.cache.block_size),
        block_of_(call.block_of),
        k_len_(sequence.k_len) {
    const auto slots = [&](const CacheView& view) {
      return Slots{static_cast<const unsigned char*>(view.data) + size * view.at(0, 0, kv_head),
                   size * view.block_stride, size * view.slot_stride};
    };
    keys_ = slots(call.cache.key);
    values_ = slots(call.cache.value);
  }

 private:
  struct Slots {
    const unsigned char* first;         // block 0, slot 0
    int64_t block_stride, slot_stride;  // bytes
  };

  __device__ __forceinline__ const unsigned char* find(const Slots& slots, int j) const {
    const int n = block_of_(j);
    const int block = table_[n];
    if (block < 0 || block >= blocks_) return nullptr;
    return slots.first + block * slots.block_stride + (j - n * block_size_) * slots.slot_stride;
  }

  template <class Tile, int kThreads>
  __device__ __forceinline__ void copy(const Slots& slots, unsigned char* tile, int j0,
                                       int columns) const {
    Tile::template copy_found<kThreads>(tile, ptx::thread_index_here(), columns,
                                        [&](int r) -> const unsigned char* {
                                          return j0 + r < k_len_ ? find(slots, j0 + r) : nullptr;
                                        });
  }

  Slots keys_, values_;
  const int32_t* table_;
  int32_t blocks_;  // of the cache
  int32_t block_size_;
  BlockDivision block_of_;
  int32_t k_len_;
};

// Of the query's type.
class PagedKeys : public PagedRows {
 public:
  template <class T, int kRows, int kColumns>
  using Tile = SharedTile<kRows, kColumns>;

  static __device__ __forceinline__ PagedKeys of(const PagedForward& call,
                                                 const FlashSequence& sequence, int kv_head) {
    return PagedKeys(call, sequence, kv_head, call.problem.dtype == DType::kFloat32 ? 4 : 2);
  }

  static __device__ __forceinline__ float key_element(const unsigned char* row, int column) {
    return reinterpret_cast<const float*>(row)[column];
  }
  static __device__ __forceinline__ float value_element(const unsigned char* row, int column) {
    return reinterpret_cast<const float*>(row)[column];
  }
  static __device__ __forceinline__ float softmax_scale(const FlashForward& call) {
    return call.problem.score.softmax_scale;
  }
  static __device__ __forceinline__ float value_scale() { return 1.0f; }

 private:
  using PagedRows::PagedRows;
};

// Bytes, which stand for stored · scale.
template <CacheType kType>
class PagedBytes : public PagedRows {
 public:
  template <class T, int kRows, int kColumns>
  using Tile = CacheTile<T, kType, kRows, kColumns>;

  static __device__ __forceinline__ PagedBytes of(const PagedForward& call,
                                                  const FlashSequence& sequence, int kv_head) {
    return PagedBytes(call, sequence, kv_head);
  }

  __device__ __forceinline__ float key_element(const unsigned char* row, int column) const {
    return widen_byte<kType>(row[column]) * key_scale_;
  }
  __device__ __forceinline__ float value_element(const unsigned char* row, int column) const {
    return widen_byte<kType>(row[column]) * value_scale_;
  }
  __device__ __forceinline__ float softmax_scale(const FlashForward&) const {
    return softmax_scale_;
  }
  __device__ __forceinline__ float value_scale() const { return value_scale_; }

 private:
  __device__ __forceinline__ PagedBytes(const PagedForward& call, const FlashSequence& sequence,
                                        int kv_head)
      : PagedRows(call, sequence, kv_head, 1),
        key_scale_(call.cache.key_scale_of(kv_head)),
        value_scale_(call.cache.value_scale_of(kv_head)),
        softmax_scale_(call.problem.score.softmax_scale * key_scale_) {}

  float key_scale_, value_scale_, softmax_scale_;
};

}  // namespace pumice::cuda
