// Launching what writes into a paged cache. Host code.
#pragma once

#include "common/attention_problem.h"
#include "common/paged_cache.h"
#include "cuda/device.h"

namespace pumice::cuda {

// cache_append: tokens to write, one to a slot of a cache. Slots and positions are not looked at by
// the host: a token whose slot or position does not exist is skipped.
struct CacheAppend {
  DType dtype;  // of key and value
  int64_t tokens;
  int32_t kv_heads, head_dim, value_dim;
  TokenView key, value;
  PagedCache cache;
  void *key_cache, *value_cache;  // cache.key.data and cache.value.data, to write to
  const int64_t* slots;           // [T]: block · block_size + offset; negative: skipped
  int32_t rotary_pairs;           // 0: no rotation
  bool interleaved;               // pairs (2p, 2p + 1) rather than (p, p + rotary_pairs)
  const float *cos, *sin;         // [max_position, rotary_pairs]
  const int64_t* positions;       // [T]
  int64_t max_position;
};
void cache_append(const CacheAppend& job, cudaStream_t stream);

// cache_copy_blocks, one cache of the two: `blocks` of slots × heads rows of row_bytes.
struct CacheCopy {
  void* data;
  int64_t block_stride, slot_stride, head_stride;  // bytes
  int64_t blocks;
  int32_t slots, heads;
  int64_t row_bytes;
  const int64_t* pairs;  // [count, 2]: source, destination
  int64_t count;
};
void cache_copy_blocks(const CacheCopy& copy, int sm_count, cudaStream_t stream);

}  // namespace pumice::cuda
