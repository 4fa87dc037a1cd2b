// cp.async and ldmatrix misused.
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"
#include "faults.h"

namespace pumice::cuda {
namespace {

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
__global__ void cp_async_out_of_bounds(const float* x, float* y) {
  auto* shared = dynamic_shared_memory<float4>();
  const int i = 4 * (threadIdx.x + 1);
  ptx::cp_async_16(&shared[threadIdx.x], x + i, !kRepaired || i < kSize);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  y[THREAD_ELEMENT] = shared[threadIdx.x].x;
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

}  // namespace

FaultTable async_faults() {
  return {
      FAULT(missing_cp_async_wait),    FAULT(uncommitted_cp_async),
      FAULT(waits_for_too_few_groups), FAULT(cp_async_wait_without_barrier),
      FAULT(write_under_cp_async),     FAULT(cp_async_while_read),
      FAULT(cp_async_out_of_bounds),   FAULT(misaligned_cp_async),
      FAULT(misaligned_ldmatrix),      FAULT(ldmatrix_of_global),
  };
}

}  // namespace pumice::cuda
