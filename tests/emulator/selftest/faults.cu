// Kernels with a planted fault each, and the same kernels repaired. Emulator only.
//
// Every kernel takes x and y of 256 floats and runs in 2 blocks of 64 threads.
#include <array>
#include <map>
#include <string>

#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mma.h"
#include "selftest.h"

namespace pumice::cuda {
namespace {

constexpr int kThreads = 64, kBlocks = 2, kSize = 256;
constexpr size_t kSharedBytes = kThreads * 16;

using Kernel = void (*)(const float*, float*);

#define THREAD_ELEMENT (blockIdx.x * kThreads + threadIdx.x)

// All threads write zeros and wait, so that what follows is not about memory that was never
// written.
__device__ void clear_shared_memory() {
  dynamic_shared_memory<float4>()[threadIdx.x] = {};
  __syncthreads();
}

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
__global__ void missing_cp_async_wait(const float* x, float* y) {
  auto* shared = dynamic_shared_memory<float4>();
  ptx::cp_async_16(&shared[threadIdx.x], x + 4 * threadIdx.x % kSize, true);
  ptx::cp_async_commit();
  if constexpr (kRepaired) ptx::cp_async_wait<0>();
  y[THREAD_ELEMENT] = shared[threadIdx.x].x;
}

template <bool kRepaired>
__global__ void uncommitted_cp_async(const float* x, float* y) {
  auto* shared = dynamic_shared_memory<float4>();
  ptx::cp_async_16(&shared[threadIdx.x], x + 4 * threadIdx.x, true);
  if constexpr (kRepaired) ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  y[THREAD_ELEMENT] = shared[threadIdx.x].x;
}

// Two groups under way, and a wait that leaves one of them.
template <bool kRepaired>
__global__ void waits_for_too_few_groups(const float* x, float* y) {
  auto* shared = dynamic_shared_memory<float2>();
  for (int i = 0; i < 2; ++i) {
    ptx::cp_async_8(&shared[threadIdx.x + i * kThreads], x + 2 * threadIdx.x, true);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<kRepaired ? 0 : 1>();
  y[THREAD_ELEMENT] = shared[threadIdx.x].x + shared[threadIdx.x + kThreads].y;
}

template <bool kRepaired>
__global__ void cp_async_wait_without_barrier(const float* x, float* y) {
  clear_shared_memory();
  auto* shared = dynamic_shared_memory<float4>();
  ptx::cp_async_16(&shared[threadIdx.x], x + 4 * threadIdx.x, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  if constexpr (kRepaired) __syncthreads();
  y[THREAD_ELEMENT] = shared[(threadIdx.x + 1) % kThreads].x;
}

template <bool kRepaired>
__global__ void write_under_cp_async(const float* x, float* y) {
  auto* shared = dynamic_shared_memory<float4>();
  ptx::cp_async_16(&shared[threadIdx.x], x + 4 * threadIdx.x, true);
  ptx::cp_async_commit();
  if constexpr (kRepaired) ptx::cp_async_wait<0>();
  shared[threadIdx.x].x = 1;
  ptx::cp_async_wait<0>();
  y[THREAD_ELEMENT] = shared[threadIdx.x].x;
}

// The copy of the next tile may land while others still read the present one.
template <bool kRepaired>
__global__ void cp_async_while_read(const float* x, float* y) {
  auto* shared = dynamic_shared_memory<float4>();
  float sum = 0;
  for (int tile = 0; tile < 2; ++tile) {
    ptx::cp_async_16(&shared[threadIdx.x], x + 4 * threadIdx.x, true);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    sum += shared[kThreads - 1 - threadIdx.x].x;
    if constexpr (kRepaired) __syncthreads();
  }
  y[THREAD_ELEMENT] = sum;
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
__global__ void cp_async_out_of_bounds(const float* x, float* y) {
  auto* shared = dynamic_shared_memory<float4>();
  const int i = 4 * (threadIdx.x + 1);
  ptx::cp_async_16(&shared[threadIdx.x], x + i, !kRepaired || i < kSize);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  y[THREAD_ELEMENT] = shared[threadIdx.x].x;
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
__global__ void misaligned_cp_async(const float* x, float* y) {
  auto* shared = dynamic_shared_memory<float4>();
  ptx::cp_async_16(&shared[threadIdx.x], x + (kRepaired ? 4 : 2), true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  y[THREAD_ELEMENT] = shared[threadIdx.x].x;
}

template <bool kRepaired>
__global__ void misaligned_ldmatrix(const float* x, float* y) {
  auto* shared = dynamic_shared_memory<float>();
  for (int i = threadIdx.x; i < kSize; i += kThreads) shared[i] = x[i];
  __syncthreads();
  uint32_t r;
  ptx::ldmatrix_x1(r, shared + (kRepaired ? 4 : 2) * lane_index());
  y[THREAD_ELEMENT] = __uint_as_float(r);
}

template <bool kRepaired>
__global__ void ldmatrix_of_global(const float* x, float* y) {
  auto* shared = dynamic_shared_memory<float>();
  for (int i = threadIdx.x; i < kSize; i += kThreads) shared[i] = x[i];
  __syncthreads();
  uint32_t r;
  ptx::ldmatrix_x1(r, (kRepaired ? shared : x) + 4 * lane_index());
  y[THREAD_ELEMENT] = __uint_as_float(r);
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

template <bool kRepaired>
__global__ void copies_as_they_are(const float* x, float* y) {
  y[THREAD_ELEMENT] = x[threadIdx.x];
}

void fault(std::string name, bool repaired, const Tensor& x, const Tensor& y) {
  std::optional<DeviceGuard> guard;
  if (name != "missing_device_guard" || repaired) guard.emplace(x);
  const auto run = [&](Kernel kernel, size_t shared_bytes = kSharedBytes) {
    launch(kernel, kBlocks, kThreads, shared_bytes, current_stream(x), read_pointer<float>(x),
           write_pointer<float>(y));
  };
#define FAULT(kernel)                        \
  {                                          \
    #kernel, { kernel<false>, kernel<true> } \
  }
  static const std::map<std::string, std::array<Kernel, 2>> kernels = {
      FAULT(shared_race),
      FAULT(missing_syncthreads),
      FAULT(overwrite_while_read),
      FAULT(missing_syncwarp),
      FAULT(shuffle_as_barrier),
      FAULT(half_warp_barrier),
      FAULT(read_by_two_warps),
      FAULT(missing_cp_async_wait),
      FAULT(uncommitted_cp_async),
      FAULT(waits_for_too_few_groups),
      FAULT(cp_async_wait_without_barrier),
      FAULT(write_under_cp_async),
      FAULT(cp_async_while_read),
      FAULT(shared_out_of_bounds),
      FAULT(uninitialised_shared),
      FAULT(global_read_out_of_bounds),
      FAULT(global_read_before_start),
      FAULT(global_write_out_of_bounds),
      FAULT(cp_async_out_of_bounds),
      FAULT(write_to_read_only),
      FAULT(misaligned_vector_load),
      FAULT(misaligned_cp_async),
      FAULT(misaligned_ldmatrix),
      FAULT(ldmatrix_of_global),
      FAULT(divergent_barrier),
      FAULT(deadlock),
      FAULT(lane_missing_from_mask),
      FAULT(shuffle_from_absent_lane),
      FAULT(mma_in_half_a_warp),
      FAULT(blocks_write_the_same),
      FAULT(block_reads_what_another_writes),
      FAULT(block_writes_what_both_read),
      FAULT(plain_read_beside_atomics),
      FAULT(last_block_without_acquire),
      FAULT(last_block_without_fence),
      FAULT(last_block_without_barrier),
      FAULT(waits_for_another_block),
      FAULT(local_array_out_of_bounds),
      FAULT(memcpy_out_of_bounds),
  };
#undef FAULT
  const auto found = kernels.find(name);
  if (found != kernels.end()) return run(found->second[repaired]);
  // Faults of launchers.
  if (name == "too_much_shared_memory") {
    return run(copies_as_they_are<true>, repaired ? kSharedBytes : 1 << 20);
  }
  if (name == "missing_device_guard") return run(copies_as_they_are<true>);
  if (name == "pointer_of_the_host") {
    auto* host = static_cast<const float*>(x.data_ptr());
    return launch(copies_as_they_are<true>, kBlocks, kThreads, 0, current_stream(x),
                  repaired ? read_pointer<float>(x) : host, write_pointer<float>(y));
  }
  STD_TORCH_CHECK(false, "no fault is called ", name);
}

}  // namespace
}  // namespace pumice::cuda

SELFTEST_IMPL(m) { m.impl("fault", TORCH_BOX(&pumice::cuda::fault)); }
