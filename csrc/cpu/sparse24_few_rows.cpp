// kernel: sparse24_few_rows
//
// y = x · W^T + bias for floating-point 2:4 weights and few rows of x, in fp32: for each kept
// weight its element of x is picked in a register.
//
// Floor: the bytes of the weight over the bandwidth of memory: of the dense weight's, half and 1/32
// (fp32) or 1/16 (16 bit) for the places. Each register of kept weights costs one shift for the
// places, a load and conversion, and for each row of x two permutations and a multiply-add.
// 4096², M = 1, one thread of a Zen 4 at 21 GB/s beside busy neighbours: fp32 1.7 ms (35.7 MB, at
// the floor; torch's dense product 3.1), bf16 0.96 ms (18.9 MB; torch 3.0), fp16 0.95 ms
// (torch 1.6).
#include <algorithm>
#include <cstring>

#include "cpu/element.h"
#include "cpu/sparse24_chunks.h"
#include "cpu/sparse24_kernels.h"
#include "cpu/sparse24_pick.h"
#include "cpu/sparse24_tile.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr int64_t kBlock = 2 * kFloats;  // columns

int64_t prepared_row(int64_t k) { return (k + kBlock - 1) / kBlock * kBlock; }

void prepare(const Sparse24FloatJob& job, float* row) {
  const int64_t padded = prepared_row(job.k);
  std::fill(row + job.k, row + padded, 0.0f);
  for (int64_t m = 0; m < job.m; ++m) {
    load_elements(job.x, job.dtype, m * job.k, job.k, row);
    order_chunks<sizeof(Lanes), 2>(row, padded * int64_t{sizeof(float)},
                                   static_cast<float*>(job.prepared) + m * padded);
  }
}

// sums[i][j] = Σ over kept weights of row j, picked from row i of x.
template <DType kDtype, int kM, int kN>
void multiply(const Sparse24FloatJob& job, int64_t m, const Sparse24Rows<kN>& rows,
              float (&sums)[kM][kN]) {
  const int64_t stride = prepared_row(job.k), kept = job.k / 2;
  const float* x = static_cast<const float*>(job.prepared) + m * stride;
  Lanes acc[kM][kN];
#pragma GCC unroll 4
  for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) acc[i][j] = zero_lanes();
  }
  const auto step = [&](int64_t k, auto load) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) {
      const Places places = load_places(rows.meta[j] + k / 4);
      const Lanes values = load(rows.values[j]);
#pragma GCC unroll 4
      for (int i = 0; i < kM; ++i) {
        acc[i][j] = multiply_add(values, pick(x + i * stride + 2 * k, places), acc[i][j]);
      }
    }
  };
  int64_t k = 0;
  for (; k + kFloats <= kept; k += kFloats) {
    rows.prefetch(k * size_of(kDtype), k / 4);
    step(k, [k](const void* values) { return load_values<kDtype>(values, k); });
  }
  if (k < kept) {
    const int64_t count = kept - k;
    step(k, [k, count](const void* values) { return load_values<kDtype>(values, k, count); });
  }
#pragma GCC unroll 4
  for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) sums[i][j] = sum_of(acc[i][j]);
  }
}

template <DType kDtype>
void multiply_columns(const Sparse24FloatJob& job, int64_t begin, int64_t end) {
  constexpr int kN = 4;
  for (int64_t n = begin; n < end; n += kN) {
    const int count = static_cast<int>(std::min<int64_t>(kN, end - n));
    const Sparse24Rows<kN> rows(job.values, job.k / 2 * size_of(kDtype), job.meta, job.k, job.n, n,
                                end);
    const Float4 bias = load_four(job.bias, n, count);
    int64_t m = 0;
    const auto tiles = [&]<int kM>() {
      for (; m + kM <= job.m; m += kM) {
        float sums[kM][kN];
        multiply<kDtype, kM, kN>(job, m, rows, sums);
        for (int i = 0; i < kM; ++i) {
          Float4 y;
          std::memcpy(&y, sums[i], sizeof(y));
          store_four(job.y, kDtype, (m + i) * job.n + n, count, y + bias);
        }
      }
    };
    if constexpr (sizeof(Lanes) == 64) tiles.template operator()<4>();  // 32 registers
    tiles.template operator()<2>();
    tiles.template operator()<1>();
  }
}

void gemm(const Sparse24FloatJob& job, int64_t begin, int64_t end) {
  switch (job.dtype) {
    case DType::kFloat16:
      return multiply_columns<DType::kFloat16>(job, begin, end);
    case DType::kBFloat16:
      return multiply_columns<DType::kBFloat16>(job, begin, end);
    default:
      return multiply_columns<DType::kFloat32>(job, begin, end);
  }
}

}  // namespace

const Sparse24FloatKernels sparse24_float_kernels = {prepared_row, prepare, gemm};

}  // namespace pumice::cpu::PUMICE_ISA
