// Launching attention to a paged cache: flash_forward's kernels, whose keys are found by the block
// table. Host code.
#pragma once

#include "common/paged_cache.h"
#include "cuda/attention/flash_forward.h"

namespace pumice::cuda {

// j / d for 0 ≤ j < 2^29 and 1 ≤ d < 2^29, by a multiplication and a shift for every d: with s =
// ceil(log2 d) and m = ceil(2^(29 + s) / d) it is m · j / 2^(29 + s), for m · d exceeds 2^(29 + s)
// by less than 2^s, which makes the quotient too large by less than 1 / d. (A division in the
// kernel takes registers that there are not.)
struct BlockDivision {
  uint32_t factor;
  int32_t shift;

  static BlockDivision by(int32_t divisor) {
    int32_t s = 0;
    while ((int64_t{1} << s) < divisor) ++s;
    const uint64_t one = uint64_t{1} << (29 + s);
    return {static_cast<uint32_t>((one + divisor - 1) / divisor), 29 + s};
  }
  PUMICE_HOST_DEVICE_MEMBER int32_t operator()(int32_t j) const {
    return static_cast<int32_t>(static_cast<uint64_t>(j) * factor >> shift);
  }
};

// The kernels' argument. problem.seq_lens has the lengths; problem.key and value are unset.
struct PagedForward : FlashForward {
  PagedCache cache;
  BlockDivision block_of;  // by cache.block_size
};

void paged_forward(const PagedForward& call, int64_t blocks, cudaStream_t stream);

// By the types of query and cache; paged_forward chooses. That of fp32 serves caches of bytes too.
void paged_forward_fp16(const PagedForward& call, int64_t blocks, cudaStream_t stream);
void paged_forward_bf16(const PagedForward& call, int64_t blocks, cudaStream_t stream);
void paged_forward_fp32(const PagedForward& call, int64_t blocks, cudaStream_t stream);
void paged_bytes_fp16(const PagedForward& call, int64_t blocks, cudaStream_t stream);
void paged_bytes_bf16(const PagedForward& call, int64_t blocks, cudaStream_t stream);

}  // namespace pumice::cuda
