// Merging partial results of attention by their lse; a warp for each row.
//
//     out = Σ_p w_p·out_p / (Σ_p w_p + w_sink),   w = exp(lse - m),   lse = m + ln(Σ_p w_p +
//     w_sink)
//
// with m the largest lse. Parts are added in their order, each column by one lane: bits do not
// depend on who finished first. A part that has seen nothing (lse = -∞) has no say, whatever its
// out holds.
#pragma once

#include "cuda/attention/flash_softmax.h"

namespace pumice::cuda {

// lse_of(p), out_of(p, column) and store(column, value) say where things are. `sink`: a natural
// logarithm that joins the sum, -∞ if there is none. Returns the lse.
template <class LseOf, class OutOf, class Store>
__device__ __forceinline__ float merge_row(int parts, int columns, float sink, LseOf&& lse_of,
                                           OutOf&& out_of, Store&& store) {
  float largest = sink;
  for (int p = 0; p < parts; ++p) largest = fmaxf(largest, lse_of(p));
  const auto weight_of = [&](float lse) {
    return lse == -INFINITY ? 0.0f : ptx::exp2_approx((lse - largest) * kLog2E);
  };
  float sum = weight_of(sink);
  for (int p = 0; p < parts; ++p) sum += weight_of(lse_of(p));
  const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
  for (int column = lane_index(); column < columns; column += kWarpSize) {
    float total = 0.0f;
#pragma unroll 4
    for (int p = 0; p < parts; ++p) {
      const float lse = lse_of(p);
      if (lse != -INFINITY) total += weight_of(lse) * out_of(p, column);
    }
    store(column, total * factor);
  }
  return sum == 0.0f ? -INFINITY : largest + logf(sum);
}

}  // namespace pumice::cuda
