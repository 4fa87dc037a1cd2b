// Where a running sum, in the order of the vocabulary, passes a part of the whole.
#pragma once

#include "cuda/sampling/sampling_block.h"

namespace pumice::cuda {

struct Located {
  int32_t index;
  Mass total;  // of all; where that is 0, the index means nothing
};

// The first index at which the sum of mass(index, value) passes ⌊fraction · total⌋, by cutting the
// units into a piece for each warp, then that piece, until a warp can hold what is left. To every
// thread; `warps` as for block_sum.
template <class Source, class MassOf>
__device__ __forceinline__ Located locate(const Source& source, uint32_t fraction, Mass* warps,
                                          MassOf&& mass) {
  const int lane = lane_index();
  int32_t begin = 0, end = source.units();
  Mass total = 0, target = 0;
  bool first = true;
  do {
    const int32_t piece = (end - begin + kSamplingWarps - 1) / kSamplingWarps;
    const int32_t from = min(begin + warp_index() * piece, end);
    Mass sum = 0;
    visit(source, from, min(from + piece, end), lane, kWarpSize,
          [&](int32_t index, float value) { sum += mass(index, value); });
    sum = warp_sum(sum);
    if (lane == 0) warps[warp_index()] = sum;
    __syncthreads();
    if (first) {
#pragma unroll
      for (int w = 0; w < kSamplingWarps; ++w) total += warps[w];
      target = part_of(total, fraction);
      first = false;
    }
    int w = 0;
    for (; w + 1 < kSamplingWarps && warps[w] <= target; ++w) target -= warps[w];
    __syncthreads();
    begin = min(begin + w * piece, end);
    end = min(begin + piece, end);
  } while (end - begin > kWarpSize);

  // A unit for each lane; every warp does the same.
  typename Source::Unit unit = {};
  Mass masses[Source::kWidth] = {}, sum = 0;
  if (begin + lane < end) {
    unit = source.load(begin + lane);
#pragma unroll
    for (int j = 0; j < Source::kWidth; ++j) {
      const int32_t index = unit.first + j;
      if (source.holds(index)) masses[j] = mass(index, source.value(unit, j));
      sum += masses[j];
    }
  }
  const Mass until = warp_running_sum(sum);
  Mass left = target - (until - sum);  // of the target, where this lane begins
  int32_t index = 0;
  bool found = false;
#pragma unroll
  for (int j = 0; j < Source::kWidth; ++j) {
    if (!found && masses[j] > left) {
      index = unit.first + j;
      found = true;
    }
    left -= masses[j];
  }
  const uint32_t passing = __ballot_sync(kFullWarp, until > target);
  const int source_lane = passing != 0 ? __ffs(static_cast<int>(passing)) - 1 : 0;
  return {__shfl_sync(kFullWarp, index, source_lane), total};
}

}  // namespace pumice::cuda
