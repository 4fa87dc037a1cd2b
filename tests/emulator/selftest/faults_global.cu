// Global memory misused, and blocks that race.
#include "faults.h"

namespace pumice::cuda {
namespace {

template <bool kRepaired>
__global__ void global_read_out_of_bounds(const float* x, float* y) {
  const int i = kSize - kThreads + (kRepaired ? 0 : 1) + threadIdx.x;
  y[THREAD_ELEMENT] = x[i];
}

template <bool kRepaired>
__global__ void global_read_before_start(const float* x, float* y) {
  y[THREAD_ELEMENT] = x[static_cast<int>(threadIdx.x) - (kRepaired ? 0 : 1)];
}

template <bool kRepaired>
__global__ void global_write_out_of_bounds(const float* x, float* y) {
  y[THREAD_ELEMENT + (kRepaired ? 0 : kSize - kThreads)] = x[threadIdx.x];
}

template <bool kRepaired>
__global__ void write_to_read_only(const float* x, float* y) {
  (kRepaired ? y : const_cast<float*>(x))[THREAD_ELEMENT] = 1;
}

template <bool kRepaired>
__global__ void misaligned_vector_load(const float* x, float* y) {
  const float4 v = *reinterpret_cast<const float4*>(x + (kRepaired ? 4 : 1));
  y[THREAD_ELEMENT] = v.x + v.w;
}

template <bool kRepaired>
__global__ void blocks_write_the_same(const float* x, float* y) {
  if constexpr (kRepaired) {
    atomicAdd(&y[threadIdx.x], x[threadIdx.x]);
  } else {
    y[threadIdx.x] += x[threadIdx.x];
  }
}

// Whichever block comes first.
template <bool kRepaired>
__global__ void block_reads_what_another_writes(const float* x, float* y) {
  if (blockIdx.x == 0) {
    y[threadIdx.x] = x[threadIdx.x];
  } else {
    y[kThreads + threadIdx.x] = kRepaired ? x[threadIdx.x] : y[threadIdx.x];
  }
}

template <bool kRepaired>
__global__ void plain_read_beside_atomics(const float* x, float* y) {
  if (blockIdx.x == 0) {
    atomicAdd(&y[0], x[threadIdx.x]);
  } else if (threadIdx.x == 0) {
    y[1] = kRepaired ? atomicAdd(&y[0], 0.0f) : y[0];
  }
}

// Both blocks read, one of them writes afterwards.
template <bool kRepaired>
__global__ void block_writes_what_both_read(const float* x, float* y) {
  const float v = y[threadIdx.x];
  y[kThreads + THREAD_ELEMENT] = x[threadIdx.x];
  if (!kRepaired && blockIdx.x == 0) y[threadIdx.x] = v + 1;
}

// The last block adds up what all blocks wrote: the counter is y[kSize - 1].
template <bool kRelease, bool kAcquire, bool kBarrier>
__device__ void last_block_sums(const float* x, float* y) {
  auto* shared = dynamic_shared_memory<unsigned>();
  y[THREAD_ELEMENT] = x[threadIdx.x];
  if constexpr (kBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    if constexpr (kRelease) __threadfence();
    shared[0] = atomicAdd(reinterpret_cast<unsigned*>(&y[kSize - 1]), 1u);
    if constexpr (kAcquire) __threadfence();
  }
  __syncthreads();
  if (shared[0] != kBlocks - 1) return;
  y[kBlocks * kThreads + threadIdx.x] = y[threadIdx.x] + y[kThreads + threadIdx.x];
}

template <bool kRepaired>
__global__ void last_block_without_fence(const float* x, float* y) {
  last_block_sums<kRepaired, true, true>(x, y);
}

template <bool kRepaired>
__global__ void last_block_without_barrier(const float* x, float* y) {
  last_block_sums<true, true, kRepaired>(x, y);
}

template <bool kRepaired>
__global__ void last_block_without_acquire(const float* x, float* y) {
  last_block_sums<true, kRepaired, true>(x, y);
}

// Blocks need not run at the same time.
template <bool kRepaired>
__global__ void waits_for_another_block(const float* x, float* y) {
  auto* arrived = reinterpret_cast<unsigned*>(&y[kSize - 1]);
  if (threadIdx.x == 0) {
    atomicAdd(arrived, 1u);
    while (!kRepaired && atomicAdd(arrived, 0u) != kBlocks) {
    }
  }
  y[THREAD_ELEMENT] = x[threadIdx.x];
}

}  // namespace

FaultTable global_faults() {
  return {
      FAULT(global_read_out_of_bounds),       FAULT(global_read_before_start),
      FAULT(global_write_out_of_bounds),      FAULT(write_to_read_only),
      FAULT(misaligned_vector_load),          FAULT(blocks_write_the_same),
      FAULT(block_reads_what_another_writes), FAULT(plain_read_beside_atomics),
      FAULT(block_writes_what_both_read),     FAULT(last_block_without_fence),
      FAULT(last_block_without_barrier),      FAULT(last_block_without_acquire),
      FAULT(waits_for_another_block),
  };
}

}  // namespace pumice::cuda
