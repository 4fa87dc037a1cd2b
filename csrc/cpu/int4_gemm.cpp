// kernel: int4_gemm
//
// y = x · W^T + extra · extra_weight^T + bias, one weight row at a time.
#include <algorithm>
#include <cmath>

#include "cpu/int4_dequantize.h"
#include "cpu/int4_kernels.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

void gather_rows(const void* x, DType dtype, int64_t k, const int32_t* perm, float* out,
                 int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    for (int64_t i = 0; i < k; ++i) {
      out[m * k + i] = load_element(x, dtype, m * k + (perm ? perm[i] : i));
    }
  }
}

void round_rows(float* x, int64_t k, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    for (int64_t first = 0; first < k; first += kActivationChunk) {
      float* chunk = x + m * k + first;
      const int64_t count = std::min(kActivationChunk, k - first);
      float absmax = 0.0f;
      bool finite = true;
      for (int64_t i = 0; i < count; ++i) {
        absmax = std::max(absmax, std::fabs(chunk[i]));
        finite &= std::isfinite(chunk[i]);
      }
      const float scale = int8_scale(absmax), inverse = int8_inverse_scale(absmax);
      for (int64_t i = 0; i < count; ++i) {
        chunk[i] = finite ? std::rint(chunk[i] * inverse) * scale : NAN;
      }
    }
  }
}

float dot(const float* a, const float* b, int64_t count) {
  constexpr int64_t kLanes = 16;
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) sums[j] += a[i + j] * b[i + j];
  }
  float sum = 0.0f;
  for (; i < count; ++i) sum += a[i] * b[i];
  for (int64_t j = 0; j < kLanes; ++j) sum += sums[j];
  return sum;
}

void gemm(const Int4GemmJob& job, float* row, int64_t n_begin, int64_t n_end) {
  const IntnWeight& weight = job.weight;
  const int64_t k = weight.k;
  const int64_t outliers = job.outlier_weight.columns, rank = job.lora_b.columns;
  for (int64_t n = n_begin; n < n_end; ++n) {
    with_intn_width(weight.bits, [&]<int kBits>() { dequantize_row<kBits>(weight, n, row); });
    float* extra = row + k;
    load_elements(job.outlier_weight.data, job.outlier_weight.dtype, n * outliers, outliers, extra);
    load_elements(job.lora_b.data, job.lora_b.dtype, n * rank, rank, extra + outliers);
    const float bias = job.bias.data ? load_element(job.bias.data, job.bias.dtype, n) : 0.0f;
    for (int64_t m = 0; m < job.m; ++m) {
      const float y = dot(job.x + m * k, row, k) +
                      dot(job.extra + m * (outliers + rank), extra, outliers + rank) + bias;
      store_element(job.y, job.y_dtype, m * weight.n + n, y);
    }
  }
}

}  // namespace

const Int4GemmKernels int4_gemm_kernels = {gather_rows, round_rows, gemm};

}  // namespace pumice::cpu::PUMICE_ISA
