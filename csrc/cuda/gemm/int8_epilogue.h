// From a warp's accumulators to y: · weight_scale + bias, cast, store.
#pragma once

#include "cuda/element.h"
#include "cuda/gemm/int8_gemm.h"

namespace pumice::cuda {

struct ColumnTerms {
  float scale, bias;
};

__device__ __forceinline__ ColumnTerms column_terms(const Int8Product& product, int64_t n) {
  if (n >= product.n) return {0.0f, 0.0f};
  return {product.weight_scale[n * product.weight_scale_stride], element_or_zero(product.bias, n)};
}

template <class T>
__device__ __forceinline__ uint32_t pack_pair(float first, float second) {
  return bits_as<uint16_t>(from_float<T>(first)) |
         static_cast<uint32_t>(bits_as<uint16_t>(from_float<T>(second))) << 16;
}

// Stores `kCount` neighbours of one row from column n on, as one vector where the row's alignment
// and end allow it.
template <class T, class Vector, int kCount>
__device__ __forceinline__ void store_neighbours(const Int8Product& product, int64_t m, int64_t n,
                                                 const Vector& vector) {
  static_assert(sizeof(Vector) == kCount * sizeof(T));
  T* y = static_cast<T*>(product.y) + m * product.n + n;
  if (product.n % kCount ==
      0) {  // then n, a multiple of kCount, is inside with all neighbours or not
    if (n < product.n) *reinterpret_cast<Vector*>(y) = vector;
    return;
  }
  struct Elements {
    T at[kCount];
  };
  const auto elements = bits_as<Elements>(vector);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (n + i < product.n) y[i] = elements.at[i];
  }
}

// The warp's part of the tile, rows m0 .. and columns n0 ..; out[i][j] is the fragment of an mma
// (ptx/mma.h). A lane has 2 neighbouring columns of a row. For a 16-bit type these are 4 bytes, so
// that the 4 lanes of a row would fill only half a sector of 32 bytes: two lanes first swap a pair,
// and each has 4 columns of one of two neighbouring fragments.
template <class T, int kFragmentsM, int kFragmentsN>
__device__ __forceinline__ void store_tile(const float (&out)[kFragmentsM][kFragmentsN][4],
                                           const Int8Product& product, int64_t m0, int64_t n0,
                                           int lane) {
  const int group = lane / 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < kFragmentsN; j += 2) {
    ColumnTerms terms[2][2];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      terms[c / 2][c % 2] = column_terms(product, n0 + (j + c / 2) * 8 + 2 * t + c % 2);
    }
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t m = m0 + i * 16 + half * 8 + group;
        float y[2][2];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const ColumnTerms& term = terms[c / 2][c % 2];
          y[c / 2][c % 2] = out[i][j + c / 2][half * 2 + c % 2] * term.scale + term.bias;
        }
        if constexpr (sizeof(T) == 4) {
          if (m >= product.m) continue;
#pragma unroll
          for (int f = 0; f < 2; ++f) {
            store_neighbours<T, float2, 2>(product, m, n0 + (j + f) * 8 + 2 * t,
                                           {y[f][0], y[f][1]});
          }
        } else {
          const uint32_t first = pack_pair<T>(y[0][0], y[0][1]);
          const uint32_t second = pack_pair<T>(y[1][0], y[1][1]);
          const bool odd = t % 2 == 1;
          const uint32_t received = __shfl_xor_sync(kFullWarp, odd ? first : second, 1);
          if (m >= product.m) continue;
          const int64_t n = n0 + (odd ? (j + 1) * 8 + 2 * (t - 1) : j * 8 + 2 * t);
          store_neighbours<T, uint2, 4>(product, m, n,
                                        odd ? uint2{received, second} : uint2{first, received});
        }
      }
    }
  }
}

}  // namespace pumice::cuda
