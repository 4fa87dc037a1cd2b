// Keys and values in blocks of a pool (Kwon et al., 2023, "PagedAttention"), without torch.
//
// The caches are [num_blocks, block_size, H_kv, D]. Token j of sequence b lies in block
// block_table[b, j / block_size], at slot j % block_size. What lies in slots past the sequence's
// length is not read, and neither are entries of the table past its last block, nor those of blocks
// that no query sees, which may have been given back (any value).
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace pumice {

// The type of what is stored: that of the query, or a byte that stands for stored · scale.
enum class CacheType : int32_t { kQuery, kFloat8E4M3, kInt8 };

// Where vectors lie in a cache; strides in elements, that of the last dimension is 1.
struct CacheView {
  const void* data = nullptr;
  int64_t block_stride = 0, slot_stride = 0, head_stride = 0;

  PUMICE_HOST_DEVICE_MEMBER int64_t at(int64_t block, int32_t slot, int64_t head) const {
    return block * block_stride + slot * slot_stride + head * head_stride;
  }
};

struct PagedCache {
  CacheType type = CacheType::kQuery;
  CacheView key, value;
  int64_t num_blocks = 0, max_blocks = 0;  // of the pool; of a sequence
  int32_t block_size = 1;
  const int32_t* block_table = nullptr;                      // [B, max_blocks]
  const float *key_scale = nullptr, *value_scale = nullptr;  // [1] or [H_kv]; null: 1
  int64_t key_scale_stride = 0, value_scale_stride = 0;      // 0: one for all heads

  PUMICE_HOST_DEVICE_MEMBER float key_scale_of(int64_t head) const {
    return key_scale == nullptr ? 1.0f : key_scale[head * key_scale_stride];
  }
  PUMICE_HOST_DEVICE_MEMBER float value_scale_of(int64_t head) const {
    return value_scale == nullptr ? 1.0f : value_scale[head * value_scale_stride];
  }
};

}  // namespace pumice
