// What cache_append asks of the CPU kernels. No torch here.
#pragma once

#include <cstdint>

#include "common/attention_problem.h"
#include "common/paged_cache.h"

namespace pumice::cpu {

// Tokens to write, one to a slot of a cache.
struct CacheAppend {
  DType dtype;  // of key and value
  int64_t kv_heads, head_dim, value_dim;
  TokenView key, value;
  PagedCache cache;
  void *key_cache, *value_cache;  // cache.key.data and cache.value.data, to write to
  const int64_t* slots;           // [T]: block · block_size + offset; negative: skipped
  int64_t rotary_pairs;           // 0: no rotation
  bool interleaved;               // pairs (2p, 2p + 1) rather than (p, p + rotary_pairs)
  const float *cos, *sin;         // [max_position, rotary_pairs]
  const int64_t* positions;       // [T]
};

struct PagedKernels {
  void (*append)(const CacheAppend& job, int64_t begin, int64_t end);  // tokens
};

#define PUMICE_DECLARE_PAGED(isa)          \
  namespace isa {                          \
  extern const PagedKernels paged_kernels; \
  }
PUMICE_DECLARE_PAGED(portable)
PUMICE_DECLARE_PAGED(avx2)
PUMICE_DECLARE_PAGED(avx512vnni)
#undef PUMICE_DECLARE_PAGED

}  // namespace pumice::cpu
