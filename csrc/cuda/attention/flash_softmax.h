// Online softmax of the rows of a warp, in base 2 (2^x is an instruction, e^x is not).
//
// Scores come in the layout of the mma's sums: lane 4g + t holds, of rows g and g + 8 of each row
// tile, columns 2t and 2t + 1 of each key tile. With `scale` the number that takes a score to base
// 2, the row keeps a reference m and
//
//     l = Σ_j 2^(scale·(s_j - m)),   o = Σ_j 2^(scale·(s_j - m)) · value_j
//
// Any m gives the same quotient. It need not be the maximum: while scores exceed it by no more than
// 2^kSlack, it stays, and neither l nor o has to be rescaled (after the first blocks hardly ever).
#pragma once

#include "cuda/attention/shared_tile.h"
#include "cuda/ptx/exp2.h"

namespace pumice::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Of the four lanes that hold a row.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}

template <int kRowTiles, int kKeyTiles>
class OnlineSoftmax {
 public:
  static constexpr int kRows = 2 * kRowTiles;  // of a lane
  // 2^8 · 65504 keys stay below the largest fp16, and p ≤ 2^8 is far from it.
  static constexpr float kSlack = 8.0f;

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      reference_[r] = -INFINITY;
      sum_[r] = 0.0f;
    }
  }

  // Takes the scores' maxima into m. Where some row of the warp has a new m, the result is true, l
  // has been rescaled, and factor[r] is what o must be multiplied by (1 for the other rows).
  __device__ __forceinline__ bool raise(const float (&scores)[kRowTiles][kKeyTiles][4], float scale,
                                        float (&factor)[kRows]) {
    bool any = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int tile = r / 2, half = r % 2 * 2;
      float largest = scores[tile][0][half];
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        largest = fmaxf(largest, fmaxf(scores[tile][n][half], scores[tile][n][half + 1]));
      }
      largest = quad_max(largest);
      // Also where there was no m, -∞; not where there still is none, or NaN.
      const bool grows = (largest - reference_[r]) * scale > kSlack;
      factor[r] = grows ? ptx::exp2_approx((reference_[r] - largest) * scale) : 1.0f;
      reference_[r] = grows ? largest : reference_[r];
      any |= grows;
    }
    if (!__any_sync(kFullWarp, any)) return false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum_[r] *= factor[r];
    return true;
  }

  // p = 2^(scale·(s - m)), in pairs of the 16-bit type T, as A operands of the next product.
  template <class T>
  __device__ __forceinline__ void weigh(const float (&scores)[kRowTiles][kKeyTiles][4], float scale,
                                        uint32_t (&p)[kRowTiles][kKeyTiles][2]) {
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      float shift[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // A row that has seen nothing: 2^(-∞ - 0) = 0.
        const float reference = reference_[2 * tile + half];
        shift[half] = reference == -INFINITY ? 0.0f : reference * scale;
      }
      // Key tile by key tile: the registers of four scores become those of an operand.
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float (&s)[4] = scores[tile][n];
          const float low = ptx::exp2_approx(__fmaf_rn(s[2 * half], scale, -shift[half]));
          const float high = ptx::exp2_approx(__fmaf_rn(s[2 * half + 1], scale, -shift[half]));
          sum_[2 * tile + half] += low + high;
          p[tile][n][half] = pack_pair<T>(low, high);
        }
      }
    }
  }

  // m in base 2, -∞ for a row that has seen nothing.
  __device__ __forceinline__ float reference(int r, float scale) const {
    return reference_[r] == -INFINITY ? -INFINITY : reference_[r] * scale;
  }
  // l; until here each lane has summed up its own columns.
  __device__ __forceinline__ float sum(int r) const { return quad_sum(sum_[r]); }

 private:
  float reference_[kRows];  // in units of the scores
  float sum_[kRows];
};

// A row's end: what o is to be multiplied by, and its lse.
struct FlashRowEnd {
  float factor, lse;
};

// `reference` and `sink` in base 2; a sink joins the sum (-∞: there is none).
__device__ __forceinline__ FlashRowEnd finish_row(float reference, float sum, float sink) {
  if (sink != -INFINITY) {
    const float largest = fmaxf(reference, sink);
    const float old = ptx::exp2_approx(reference - largest);
    sum = sum * old + ptx::exp2_approx(sink - largest);
    return {__fdividef(old, sum), (largest + __log2f(sum)) * kLn2};
  }
  if (reference == -INFINITY && sum == 0.0f) return {0.0f, -INFINITY};
  return {__fdividef(1.0f, sum), (reference + __log2f(sum)) * kLn2};
}

}  // namespace pumice::cuda
