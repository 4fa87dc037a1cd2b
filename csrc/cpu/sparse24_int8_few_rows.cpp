// kernel: sparse24_int8_few_rows
//
// y = ((q @ W^T) · scale) · weight_scale + bias for int8 2:4 weights and few rows of q: for each
// kept weight its element of q is picked in a register.
//
// Floor: the bytes of the weight over the bandwidth of memory, five eighths of the dense weight's:
// N·K/2 of values and N·K/8 of places. 4096², M = 1, one thread of a Zen 4 at 21 GB/s beside busy
// neighbours: 0.46 ms (10.5 MB, at the floor; the dense kernel 0.87). With AVX2 it is 16 vector
// instructions for each 32 weights, 5.5 cycles: 0.40 ms when the weight is in cache.
#include <algorithm>
#include <cstring>

#include "cpu/element.h"
#include "cpu/sparse24_bytes.h"
#include "cpu/sparse24_chunks.h"
#include "cpu/sparse24_kernels.h"
#include "cpu/sparse24_tile.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr int64_t kBlock = 2 * kBytes;  // columns

int64_t prepared_row(int64_t k) { return (k + kBlock - 1) / kBlock * kBlock; }

void prepare(const Sparse24Int8Job& job, uint8_t* row) {
  const int64_t padded = prepared_row(job.k);
  std::fill(row + job.k, row + padded, uint8_t{0});  // the weights are zero there
  for (int64_t m = 0; m < job.m; ++m) {
    for (int64_t k = 0; k < job.k; ++k) row[k] = prepare_byte(job.q[m * job.k + k]);
    order_chunks<kBytes, 2>(row, padded, job.prepared + m * padded);
  }
}

// sums[i][j] = Σ over kept weights of row j, picked from row m + i of q, exactly.
template <int kM, int kN>
void multiply(const Sparse24Int8Job& job, int64_t m, const Sparse24Rows<kN>& rows,
              int32_t (&sums)[kM][kN]) {
  const int64_t stride = prepared_row(job.k), kept = job.k / 2;
  const uint8_t* x = job.prepared + m * stride;
  IntLanes acc[kM][kN], correction[kN];
#pragma GCC unroll 4
  for (int j = 0; j < kN; ++j) {
    correction[j] = zero_lanes();
#pragma GCC unroll 4
    for (int i = 0; i < kM; ++i) acc[i][j] = zero_lanes();
  }
  const auto step = [&](int64_t k, auto places_of, auto values_of) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) {
      const Places places = places_of(rows.meta[j] + k / 4);
      const Values values = values_of(reinterpret_cast<const int8_t*>(rows.values[j]) + k);
      correction[j] = add_correction(correction[j], values);
#pragma GCC unroll 4
      for (int i = 0; i < kM; ++i) {
        acc[i][j] = add_products(acc[i][j], pick(x + i * stride + 2 * k, places), values);
      }
    }
  };
  int64_t k = 0;
  for (; k + kBytes <= kept; k += kBytes) {
    rows.prefetch(k, k / 4);
    step(
        k, [](const uint8_t* meta) { return load_places(meta); },
        [](const int8_t* values) { return load_values(values); });
  }
  if (k < kept) {
    const int64_t count = kept - k;
    step(
        k, [count](const uint8_t* meta) { return load_places(meta, count); },
        [count](const int8_t* values) { return load_values(values, count); });
  }
#pragma GCC unroll 4
  for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) sums[i][j] = exact_sum(acc[i][j], correction[j]);
  }
}

void gemm(const Sparse24Int8Job& job, int64_t begin, int64_t end) {
  constexpr int kN = 4;
  for (int64_t n = begin; n < end; n += kN) {
    const int count = static_cast<int>(std::min<int64_t>(kN, end - n));
    const Sparse24Rows<kN> rows(job.values, job.k / 2, job.meta, job.k, job.n, n, end);
    const Float4 bias = load_four(job.bias, n, count);
    Float4 weight_scale;
    for (int j = 0; j < kN; ++j) {
      weight_scale[j] = job.weight_scale[std::min(n + j, end - 1) * job.weight_scale_stride];
    }
    int64_t m = 0;
    const auto tiles = [&]<int kM>() {
      for (; m + kM <= job.m; m += kM) {
        int32_t sums[kM][kN];
        multiply<kM, kN>(job, m, rows, sums);
        for (int i = 0; i < kM; ++i) {
          const float scale = job.scale[(m + i) * job.scale_stride];
          Float4 value;
          for (int j = 0; j < kN; ++j) value[j] = static_cast<float>(sums[i][j]) * scale;
          store_four(job.y, job.y_dtype, (m + i) * job.n + n, count, value * weight_scale + bias);
        }
      }
    };
    if constexpr (kBytes == 64) tiles.template operator()<4>();  // 32 registers
    tiles.template operator()<2>();
    tiles.template operator()<1>();
  }
}

// Panels take over from here (sparse24_int8_panel.cpp), and decompressing where there are none.
constexpr int64_t kFewRows = kBytes == 32 ? 2 : 4;

}  // namespace

const Sparse24Int8Kernels sparse24_int8_kernels = {kFewRows, prepared_row, prepare, gemm};

}  // namespace pumice::cpu::PUMICE_ISA
