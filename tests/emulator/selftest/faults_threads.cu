// Threads of a block that do not meet, and shared memory misused.
#include "cuda/ptx/mma.h"
#include "faults.h"

namespace pumice::cuda {
namespace {

template <bool kRepaired>
__global__ void shared_race(const float* x, float* y) {
  auto* shared = dynamic_shared_memory<float>();
  if (!kRepaired || threadIdx.x == 0) shared[0] = x[0];
  __syncthreads();
  y[THREAD_ELEMENT] = shared[0];
}

template <bool kRepaired>
__global__ void missing_syncthreads(const float* x, float* y) {
  clear_shared_memory();
  auto* shared = dynamic_shared_memory<float>();
  for (int i = threadIdx.x; i < 2 * kThreads; i += kThreads) shared[i] = x[i];
  if constexpr (kRepaired) __syncthreads();
  y[THREAD_ELEMENT] = shared[threadIdx.x + 1];
}

// The next tile overwrites one that other threads may still read.
template <bool kRepaired>
__global__ void overwrite_while_read(const float* x, float* y) {
  auto* shared = dynamic_shared_memory<float>();
  float sum = 0;
  for (int tile = 0; tile < 2; ++tile) {
    shared[threadIdx.x] = x[tile * kThreads + threadIdx.x];
    __syncthreads();
    sum += shared[kThreads - 1 - threadIdx.x];
    if constexpr (kRepaired) __syncthreads();
  }
  y[THREAD_ELEMENT] = sum;
}

template <bool kRepaired>
__global__ void missing_syncwarp(const float* x, float* y) {
  clear_shared_memory();
  auto* shared = dynamic_shared_memory<float>();
  shared[threadIdx.x] = x[threadIdx.x];
  if constexpr (kRepaired) __syncwarp();
  y[THREAD_ELEMENT] = shared[threadIdx.x ^ 1];
}

// Shuffles meet, but they do not order memory.
template <bool kRepaired>
__global__ void shuffle_as_barrier(const float* x, float* y) {
  clear_shared_memory();
  auto* shared = dynamic_shared_memory<float>();
  shared[threadIdx.x] = x[threadIdx.x];
  const float other = __shfl_xor_sync(kFullWarp, x[threadIdx.x], 1);
  if constexpr (kRepaired) __syncwarp();
  y[THREAD_ELEMENT] = shared[threadIdx.x ^ 1] + other;
}

// A barrier of half a warp orders that half only.
template <bool kRepaired>
__global__ void half_warp_barrier(const float* x, float* y) {
  clear_shared_memory();
  auto* shared = dynamic_shared_memory<float>();
  if (threadIdx.x == 16) shared[16] = x[16];
  if (threadIdx.x < 32) {
    __syncwarp(kRepaired ? kFullWarp : threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u);
  }
  y[THREAD_ELEMENT] = threadIdx.x == 0 ? shared[16] : x[threadIdx.x];
}

// Two readers, of which one writes.
template <bool kRepaired>
__global__ void read_by_two_warps(const float* x, float* y) {
  clear_shared_memory();
  auto* shared = dynamic_shared_memory<float>();
  const float v = threadIdx.x % 32 == 0 ? shared[0] : 0;
  if constexpr (kRepaired) __syncthreads();
  if (threadIdx.x == 0) shared[0] = x[0] + v;
  y[THREAD_ELEMENT] = x[threadIdx.x];
}

template <bool kRepaired>
__global__ void shared_out_of_bounds(const float* x, float* y) {
  auto* shared = dynamic_shared_memory<float4>();
  shared[threadIdx.x + (kRepaired ? 0 : 1)] = {x[0], x[1], x[2], x[3]};
  y[THREAD_ELEMENT] = shared[threadIdx.x + (kRepaired ? 0 : 1)].w;
}

template <bool kRepaired>
__global__ void uninitialised_shared(const float* x, float* y) {
  auto* shared = dynamic_shared_memory<float>();
  if (kRepaired || threadIdx.x != 7) shared[threadIdx.x] = x[threadIdx.x];
  y[THREAD_ELEMENT] = shared[threadIdx.x];
}

template <bool kRepaired>
__global__ void divergent_barrier(const float* x, float* y) {
  if (kRepaired || threadIdx.x != 5) __syncthreads();
  y[THREAD_ELEMENT] = x[threadIdx.x];
}

template <bool kRepaired>
__global__ void deadlock(const float* x, float* y) {
  if (kRepaired || threadIdx.x < 48) {
    __syncwarp();
  }
  __syncthreads();
  y[THREAD_ELEMENT] = x[threadIdx.x];
}

template <bool kRepaired>
__global__ void lane_missing_from_mask(const float* x, float* y) {
  y[THREAD_ELEMENT] = __shfl_sync(kRepaired ? kFullWarp : 0x7fffffffu, x[threadIdx.x], 0);
}

template <bool kRepaired>
__global__ void shuffle_from_absent_lane(const float* x, float* y) {
  float v = 0;
  if (threadIdx.x % 32 < 16) {
    v = __shfl_sync(0x0000ffffu, x[threadIdx.x], kRepaired ? 15 : 16);
  }
  y[THREAD_ELEMENT] = v;
}

template <bool kRepaired>
__global__ void mma_in_half_a_warp(const float* x, float* y) {
  if (!kRepaired && threadIdx.x % 32 >= 16) return;
  const uint32_t a[4] = {}, b[2] = {};
  float d[4] = {x[threadIdx.x]};
  ptx::mma_m16n8k16_f16(d, a, b);
  y[THREAD_ELEMENT] = d[0];
}

template <bool kRepaired>
__global__ void local_array_out_of_bounds(const float* x, float* y) {
  float local[4];
  for (int i = 0; i < 4; ++i) local[i] = x[i];
  const int i = static_cast<int>(threadIdx.x % (kRepaired ? 4 : 5));
  y[THREAD_ELEMENT] = local[i];
}

template <bool kRepaired>
__global__ void memcpy_out_of_bounds(const float* x, float* y) {
  auto* shared = dynamic_shared_memory<float4>();
  float4 v = {x[0], x[1], x[2], x[3]};
  memcpy(&shared[threadIdx.x + (kRepaired ? 0 : 1)], &v, sizeof(v));
  y[THREAD_ELEMENT] = v.x;
}

}  // namespace

FaultTable thread_faults() {
  return {
      FAULT(shared_race),
      FAULT(missing_syncthreads),
      FAULT(overwrite_while_read),
      FAULT(missing_syncwarp),
      FAULT(shuffle_as_barrier),
      FAULT(half_warp_barrier),
      FAULT(read_by_two_warps),
      FAULT(shared_out_of_bounds),
      FAULT(uninitialised_shared),
      FAULT(divergent_barrier),
      FAULT(deadlock),
      FAULT(lane_missing_from_mask),
      FAULT(shuffle_from_absent_lane),
      FAULT(mma_in_half_a_warp),
      FAULT(local_array_out_of_bounds),
      FAULT(memcpy_out_of_bounds),
  };
}

}  // namespace pumice::cuda
