// The 16-bit kernels of flash_backward for one type of operands.
#pragma once

#include <algorithm>

#include "cuda/attention/flash_backward_keys.h"
#include "cuda/attention/flash_backward_queries.h"

namespace pumice::cuda {

template <class T, class KeysTile, class QueriesTile>
void launch_flash_backward(const FlashBackward& call, cudaStream_t stream) {
  launch_flash_backward_keys<T, KeysTile>(call, stream);
  launch_flash_backward_queries<T, QueriesTile>(call, stream);
}

// By the larger head dim, and by the shared memory that a block may have.
template <class T>
void launch_flash_backward_16bit(const FlashBackward& call, size_t shared_memory_limit,
                                 cudaStream_t stream) {
  const int64_t dim = std::max(call.problem.head_dim, call.problem.value_dim);
  if (dim <= 64) {
    launch_flash_backward<T, FlashGradKeys64, FlashGradQueries64>(call, stream);
  } else if (dim <= 128) {
    if (FlashGradKeys128::kSharedBytes <= shared_memory_limit) {
      launch_flash_backward<T, FlashGradKeys128, FlashGradQueries128>(call, stream);
    } else {
      launch_flash_backward<T, FlashGradKeys128Compact, FlashGradQueries128Compact>(call, stream);
    }
  } else if (FlashGradKeys256::kSharedBytes <= shared_memory_limit) {
    launch_flash_backward<T, FlashGradKeys256, FlashGradQueries256>(call, stream);
  } else {
    launch_flash_backward<T, FlashGradKeys256Compact, FlashGradQueries256Compact>(call, stream);
  }
}

}  // namespace pumice::cuda
