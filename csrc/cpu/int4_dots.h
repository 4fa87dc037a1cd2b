// Dot products in fp32, and what they need of the epilogue.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/element.h"
#include "cpu/int4_kernels.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr int64_t kLanes = 16;
typedef float FloatLanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

inline float sum_of_lanes(const FloatLanes& lanes) {
  Float4 quarters[4];
  std::memcpy(quarters, &lanes, sizeof(lanes));
  const Float4 four = (quarters[0] + quarters[1]) + (quarters[2] + quarters[3]);
  return (four[0] + four[1]) + (four[2] + four[3]);
}

// sums[i][j] += Σ_k a[i·a_stride + k] · b[j·b_stride + k]
template <int kM, int kN>
void add_dots(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t count,
              float (&sums)[kM][kN]) {
  FloatLanes lanes[kM][kN] = {};
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    for (int i = 0; i < kM; ++i) {
      const FloatLanes ai = *reinterpret_cast<const FloatLanes*>(a + i * a_stride + k);
      for (int j = 0; j < kN; ++j) {
        lanes[i][j] += ai * *reinterpret_cast<const FloatLanes*>(b + j * b_stride + k);
      }
    }
  }
  for (int i = 0; i < kM; ++i) {
    for (int j = 0; j < kN; ++j) {
      float rest = 0.0f;
      for (int64_t l = k; l < count; ++l) rest += a[i * a_stride + l] * b[j * b_stride + l];
      sums[i][j] += sum_of_lanes(lanes[i][j]) + rest;
    }
  }
}

// The row of (outlier_weight | lora_b) of column n.
inline void load_extra(const Int4Epilogue& epilogue, int64_t n, float* row) {
  for (const MatrixView* factor : {&epilogue.outlier_weight, &epilogue.lora_b}) {
    load_elements(factor->data, factor->dtype, n * factor->columns, factor->columns, row);
    row += factor->columns;
  }
}

inline Float4 load_bias(const Int4Epilogue& epilogue, int64_t n, int count) {
  Float4 bias = {};
  for (int j = 0; j < count && epilogue.bias.data; ++j) {
    bias[j] = load_element(epilogue.bias.data, epilogue.bias.dtype, n + j);
  }
  return bias;
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
