// Where a sum over falling keys reaches a number, without sorting: histograms of ever narrower
// intervals of keys (a radix selection whose digits are cut where the keys are).
#pragma once

#include "cuda/sampling/sampling_block.h"

namespace pumice::cuda {

constexpr int kSelectBits = 10;
constexpr int kSelectBins = 1 << kSelectBits;

// Shared memory of select(). Sums have 64 bits, in two halves, for there are atomic additions of 32
// bits in shared memory, and only loops of compare-and-swap of 64.
struct SelectShared {
  uint32_t low[kSelectBins], high[kSelectBins];
  Mass warps[kSamplingWarps];
  Mass before;
  int32_t bin;

  __device__ __forceinline__ void add(uint32_t bin_index, Mass quantity) {
    const auto addend = static_cast<uint32_t>(quantity);
    const uint32_t old = atomicAdd(&low[bin_index], addend);
    const uint32_t carry = addend > ~old ? 1 : 0;
    const uint32_t upper = static_cast<uint32_t>(quantity >> 32) + carry;
    if (upper != 0) atomicAdd(&high[bin_index], upper);
  }
};

struct Selected {
  uint32_t key;
  Mass before;  // the sum of larger keys
};

// The largest key at which the sum of quantities of keys in [low_key, high_key] not smaller than it
// reaches `need`, which is from 1 to the whole sum. key(index, value) and quantity(index, value)
// are those of an element. To every thread.
template <class Source, class Key, class Quantity>
__device__ __forceinline__ Selected select(const Source& source, uint32_t low_key,
                                           uint32_t high_key, Mass need, SelectShared& shared,
                                           Key&& key, Quantity&& quantity) {
  constexpr int kBinsOfThread = kSelectBins / kSamplingThreads;
  const int thread = static_cast<int>(threadIdx.x);
  Mass before_all = 0;
  while (true) {
    const uint32_t width = high_key - low_key;
    const int bits = 32 - __clz(static_cast<int>(width));
    const int shift = bits > kSelectBits ? bits - kSelectBits : 0;
#pragma unroll
    for (int i = 0; i < kBinsOfThread; ++i) {
      shared.low[thread + i * kSamplingThreads] = 0;
      shared.high[thread + i * kSamplingThreads] = 0;
    }
    __syncthreads();
    visit_all(source, [&](int32_t index, float value) {
      const uint32_t k = key(index, value);
      if (k < low_key || k > high_key) return;
      const Mass q = quantity(index, value);
      if (q != 0) shared.add((high_key - k) >> shift, q);
    });
    __syncthreads();

    // The first bin at which the running sum reaches the need: two bins a thread, in order.
    Mass sums[kBinsOfThread], sum = 0;
#pragma unroll
    for (int i = 0; i < kBinsOfThread; ++i) {
      const int bin = kBinsOfThread * thread + i;
      sums[i] = static_cast<Mass>(shared.high[bin]) << 32 | shared.low[bin];
      sum += sums[i];
    }
    const Mass until = warp_running_sum(sum);
    if (lane_index() == kWarpSize - 1) shared.warps[warp_index()] = until;
    if (thread == 0) shared.bin = 0;
    __syncthreads();
    Mass running = until - sum;
    for (int w = 0; w < warp_index(); ++w) running += shared.warps[w];
#pragma unroll
    for (int i = 0; i < kBinsOfThread; ++i) {
      if (running < need && running + sums[i] >= need) {
        shared.bin = kBinsOfThread * thread + i;
        shared.before = running;
      }
      running += sums[i];
    }
    __syncthreads();
    const auto bin = static_cast<uint32_t>(shared.bin);
    const Mass before = shared.before;
    __syncthreads();
    before_all += before;
    need -= before;
    high_key -= bin << shift;
    if (shift == 0) return {high_key, before_all};
    const uint32_t last = high_key - ((1u << shift) - 1);
    if (high_key - low_key > (1u << shift) - 1) low_key = last;
  }
}

}  // namespace pumice::cuda
