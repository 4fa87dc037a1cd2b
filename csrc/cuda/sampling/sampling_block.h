// What a block of the sampling kernels does together: sums, and the elements that its threads
// visit.
#pragma once

#include "common/sampling_numerics.h"
#include "cuda/device.h"

namespace pumice::cuda {

constexpr int kSamplingThreads = 512;
constexpr int kSamplingWarps = kSamplingThreads / kWarpSize;

__device__ __forceinline__ Mass warp_sum(Mass value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, offset);
  }
  return value;
}

// The sum of this lane's value and those of the lanes before.
__device__ __forceinline__ Mass warp_running_sum(Mass value) {
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const Mass before = __shfl_up_sync(kFullWarp, value, offset);
    if (lane_index() >= offset) value += before;
  }
  return value;
}

// Of the whole block, to every thread. `warps` [kSamplingWarps] is shared memory, free again on
// return.
__device__ __forceinline__ Mass block_sum(Mass value, Mass* warps) {
  value = warp_sum(value);
  if (lane_index() == 0) warps[warp_index()] = value;
  __syncthreads();
  Mass sum = 0;
#pragma unroll
  for (int w = 0; w < kSamplingWarps; ++w) sum += warps[w];
  __syncthreads();
  return sum;
}

__device__ __forceinline__ uint64_t block_max(uint64_t value, uint64_t* warps) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const uint64_t other = __shfl_xor_sync(kFullWarp, value, offset);
    value = other > value ? other : value;
  }
  if (lane_index() == 0) warps[warp_index()] = value;
  __syncthreads();
  uint64_t largest = 0;
#pragma unroll
  for (int w = 0; w < kSamplingWarps; ++w) largest = warps[w] > largest ? warps[w] : largest;
  __syncthreads();
  return largest;
}

// A source of floats, each with the index of its token, comes in units of kWidth elements, the
// index of the first of which may be negative, and that of the last beyond the last token:
//
//     static constexpr int kWidth;
//     struct Unit { int32_t first; ... };  // the index of its first element, and all of them
//     int32_t units() const;
//     Unit load(int32_t unit) const;
//     float value(const Unit& unit, int i) const;
//     bool holds(int32_t index) const;  // whether there is such an element
//
// f(index, value) for the elements of units begin + worker, begin + worker + workers, ... before
// end. Some units are loaded at once, so that their latencies overlap.
template <class Source, class F>
__device__ __forceinline__ void visit(const Source& source, int32_t begin, int32_t end,
                                      int32_t worker, int32_t workers, F&& f) {
  constexpr int kAtOnce = 4;
  for (int32_t unit = begin + worker; unit < end; unit += kAtOnce * workers) {
    typename Source::Unit loaded[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (unit + i * workers < end) loaded[i] = source.load(unit + i * workers);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (unit + i * workers >= end) break;
#pragma unroll
      for (int j = 0; j < Source::kWidth; ++j) {
        const int32_t index = loaded[i].first + j;
        if (source.holds(index)) f(index, source.value(loaded[i], j));
      }
    }
  }
}

// Every element of a source, by the block's threads.
template <class Source, class F>
__device__ __forceinline__ void visit_all(const Source& source, F&& f) {
  visit(source, 0, source.units(), static_cast<int32_t>(threadIdx.x), kSamplingThreads, f);
}

// Σ f(index, value), to every thread.
template <class Source, class F>
__device__ __forceinline__ Mass block_sum_of(const Source& source, Mass* warps, F&& f) {
  Mass sum = 0;
  visit_all(source, [&](int32_t index, float value) { sum += f(index, value); });
  return block_sum(sum, warps);
}

}  // namespace pumice::cuda
