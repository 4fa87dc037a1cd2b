// Dot products in fp32, and what they need of the epilogue.
#pragma once

#include <cstdint>

#include "cpu/element.h"
#include "cpu/int4_kernels.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr int64_t kLanes = 16;
typedef float FloatLanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

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
      float sum = 0.0f;
      for (int64_t l = k; l < count; ++l) sum += a[i * a_stride + l] * b[j * b_stride + l];
      for (int64_t l = 0; l < kLanes; ++l) sum += lanes[i][j][l];
      sums[i][j] += sum;
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
