// kernel: int4_gemm
//
// The general product: y = x · W^T + extra · extra_weight^T + bias with W of any width and any
// assignment of columns to groups, dequantized a few rows at a time to fp32, and x in fp32.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/element.h"
#include "cpu/int4_activations.h"
#include "cpu/int4_dequantize.h"
#include "cpu/int4_dots.h"
#include "cpu/int4_kernels.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

// Weight rows and rows of x that are multiplied at a time.
constexpr int kTileN = 4;
constexpr int kTileM = 2;

void gather_rows(const Int4Activations& x, float* out, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) gather_row(x, m, out + m * x.k, x.k);
}

void round_rows(const Int4Activations& x, float* out, int64_t begin, int64_t end) {
  float values[kActivationBlock];
  int32_t q[kActivationBlock];
  for (int64_t m = begin; m < end; ++m) {
    float* row = out + m * x.k;
    gather_row(x, m, row, x.k);
    for (int64_t first = 0; first < x.k; first += kActivationBlock) {
      const int64_t count = std::min(kActivationBlock, x.k - first);
      std::fill(std::copy_n(row + first, count, values), values + kActivationBlock, 0.0f);
      const BlockScale scale = block_scale<1>(values);
      round_block(values, scale.inverse, q);
      for (int64_t i = 0; i < count; ++i) row[first + i] = static_cast<float>(q[i]) * scale.scale;
    }
  }
}

// f.template operator()<count>(m, …) for all rows [begin, end), kTileM and then one at a time.
template <typename F>
void for_tiles(int64_t begin, int64_t end, const F& f) {
  int64_t m = begin;
  for (; m + kTileM <= end; m += kTileM) f.template operator()<kTileM>(m);
  for (; m < end; ++m) f.template operator()<1>(m);
}

void multiply_rows(const float* x, int64_t k, const MatrixView& factor, float* row, float* out,
                   int64_t stride, int64_t begin, int64_t end) {
  for (int64_t r = 0; r < factor.rows; ++r) {
    load_elements(factor.data, factor.dtype, r * k, k, row);
    for_tiles(begin, end, [&]<int kM>(int64_t m) {
      float sums[kM][1] = {};
      add_dots<kM, 1>(x + m * k, k, row, k, k, sums);
      for (int i = 0; i < kM; ++i) out[(m + i) * stride + r] = sums[i][0];
    });
  }
}

// The weight rows of kTileN columns of y in fp32: K of W, then those of extra.
void load_rows(const Int4GemmJob& job, int64_t begin, float* rows) {
  const IntnWeight& weight = job.weight;
  for (int j = 0; j < kTileN; ++j) {
    const int64_t n = std::min(begin + j, weight.n - 1);
    float* row = rows + j * (weight.k + job.epilogue.extras());
    with_intn_width(weight.bits, [&]<int kBits>() { dequantize_row<kBits>(weight, n, row); });
    load_extra(job.epilogue, n, row + weight.k);
  }
}

void gemm(const Int4GemmJob& job, float* rows, int64_t n_begin, int64_t n_end) {
  const Int4Epilogue& epilogue = job.epilogue;
  const int64_t k = job.weight.k, extras = epilogue.extras(), stride = k + extras;
  for (int64_t n = n_begin; n < n_end; n += kTileN) {
    const int count = static_cast<int>(std::min<int64_t>(kTileN, n_end - n));
    load_rows(job, n, rows);
    const Float4 bias = load_bias(epilogue, n, count);
    for_tiles(0, job.m, [&]<int kM>(int64_t m) {
      float sums[kM][kTileN] = {};
      add_dots<kM, kTileN>(job.x + m * k, k, rows, stride, k, sums);
      add_dots<kM, kTileN>(epilogue.extra + m * extras, extras, rows + k, stride, extras, sums);
      for (int i = 0; i < kM; ++i) {
        Float4 y;
        std::memcpy(&y, sums[i], sizeof(y));
        store_four(epilogue.y, epilogue.y_dtype, (m + i) * epilogue.y_stride + n, count, y + bias);
      }
    });
  }
}

int64_t gemm_scratch(int64_t k, int64_t extras) { return kTileN * (k + extras); }

}  // namespace

const Int4GemmKernels int4_gemm_kernels = {gather_rows, round_rows, multiply_rows, gemm,
                                           gemm_scratch};

}  // namespace pumice::cpu::PUMICE_ISA
