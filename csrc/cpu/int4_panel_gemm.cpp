// kernel: int4_panel_gemm
//
// y = x · W^T + extra · extra_weight^T + bias for 4-bit weights: integer products of nibbles and
// digits (int4_activations.h), scaled where a group or a block of activations ends.
//
// kPanel weight rows lie side by side in the lanes of a register, so that a lane's sum runs over a
// whole group: scaling costs one in ten instructions at groups of 128. Putting them there, a
// transposition of the packed words, is shared by all rows of x.
//
// Floor: M·N·K/64 vpdpbusd for each digit (AVX-512; one a cycle on Zen 4). 4096² g128, M = 128, at
// 3.7 GHz: 9.1 ms with int8 activations, 18.2 ms with bf16; measured 12.5 and 22.9 ms, 73 and 80 %.
// (fp32 or bf16 multiply-adds would take 36 and 18 ms, and widening the weights comes on top.)
#include <algorithm>
#include <cstring>

#include "cpu/element.h"
#include "cpu/int4_activations.h"
#include "cpu/int4_kernels.h"
#include "cpu/int4_panel.h"
#include "cpu/int4_panel_columns.h"

namespace pumice::cpu::PUMICE_ISA {

#if defined(__AVX2__)

namespace {

// kPanel columns of y: the weight rows, and for each group their scales and zero points.
struct Panel {
  int64_t begin;
  int count;                     // of columns that exist
  const uint32_t* rows[kPanel];  // past the end the last one again
  Lanes* scales;                 // [G]
  Lanes* zeros;                  // [G]
  uint8_t* nibbles;              // of one block
  Lanes* sums;                   // [rows of x], fp32
};

int64_t scratch(const Int4DigitJob& job) {
  constexpr int64_t kNibbleFloats = kBlockWords * 2 * kPanel;
  return (2 * job.weight.groups + kMaxDigitRows) * kPanel + kNibbleFloats;
}

// sums[m] = bias + extra[m] · extra_weight^T
void begin_sums(const Int4Epilogue& epilogue, int64_t m_begin, int64_t m_end, Panel& panel) {
  std::fill_n(panel.sums, m_end - m_begin, load_bias(epilogue.bias, panel.begin, panel.count));
  const int64_t outliers = epilogue.outlier_weight.columns, extras = epilogue.extras();
  for (int64_t j = 0; j < extras; ++j) {
    const MatrixView& factor = j < outliers ? epilogue.outlier_weight : epilogue.lora_b;
    const int64_t column = j < outliers ? j : j - outliers, stride = factor.columns;
    const Lanes weights =
        load_column(factor.data, factor.dtype, panel.begin * stride + column, stride, panel.count);
    for (int64_t m = m_begin; m < m_end; ++m) {
      Lanes& sum = panel.sums[m - m_begin];
      sum = multiply_add(broadcast(epilogue.extra[m * extras + j]), weights, sum);
    }
  }
}

// Adds the products of one block of the weight rows with kRows rows of x.
template <int kRows, int kPlanes>
void add_tile(const Int4DigitJob& job, int64_t block, int64_t m, const Panel& panel, Lanes* sums) {
  constexpr int kTerms = (kPlanes + 1) / 2;
  constexpr int kDigits = kPlanes / kTerms;  // of a term
  constexpr int64_t kTermDigits = kDigits * kBlockWords * 2 * kRows;
  const int32_t* digits = job.digits + m * job.digits_per_row() + block * kTerms * kTermDigits;
  const float* all = job.statistics + m * job.statistics_per_row();
  for (int64_t s = job.block_segments[block]; s < job.block_segments[block + 1]; ++s) {
    const Int4Segment& segment = job.segments[s];
    const float* statistics = all + s * (1 + kTerms) * kRows;
    const Lanes scale = panel.scales[segment.group], zero = panel.zeros[segment.group];
    // Σ (q - zero)·x = Σ q·x - zero·Σ x, both sums exact
    IntLanes products[kRows];
    dot<kRows, kDigits>(panel.nibbles, digits, segment.begin, segment.end, products);
    Lanes term[kRows];
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) {
      term[r] =
          negative_multiply_add(zero, broadcast(statistics[kRows + r]), to_float(products[r]));
    }
    if constexpr (kTerms == 2) {
      dot<kRows, kDigits>(panel.nibbles, digits + kTermDigits, segment.begin, segment.end,
                          products);
#pragma GCC unroll 32
      for (int r = 0; r < kRows; ++r) {
        const Lanes low = negative_multiply_add(zero, broadcast(statistics[2 * kRows + r]),
                                                to_float(products[r]));
        term[r] = multiply_add(low, broadcast(0x1p-16f), term[r]);
      }
    }
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) {
      sums[r] = multiply_add(term[r], scale * broadcast(statistics[r]), sums[r]);
    }
  }
}

template <int kPlanes>
void add_block(const Int4DigitJob& job, int64_t block, int64_t m_begin, int64_t m_end,
               const Panel& panel) {
  int64_t m = m_begin;
  const auto tiles = [&]<int kRows>() {
    for (; m + kRows <= m_end; m += kRows) {
      add_tile<kRows, kPlanes>(job, block, m, panel, panel.sums + (m - m_begin));
    }
  };
  tiles.template operator()<16>();
  tiles.template operator()<8>();
  tiles.template operator()<4>();
  tiles.template operator()<2>();
  tiles.template operator()<1>();
}

void store_sums(const Int4DigitJob& job, int64_t m_begin, int64_t m_end, const Panel& panel) {
  const Int4Epilogue& epilogue = job.epilogue;
  for (int64_t m = m_begin; m < m_end; ++m) {
    store_columns(epilogue.y, epilogue.y_dtype, m * epilogue.y_stride + panel.begin, panel.count,
                  panel.sums[m - m_begin]);
  }
}

void gemm(const Int4DigitJob& job, float* memory, int64_t m_begin, int64_t m_end, int64_t n_begin,
          int64_t n_end) {
  const IntnWeight& weight = job.weight;
  const int64_t row_words = intn_words(weight.k, 4);
  Panel panel;
  panel.scales = reinterpret_cast<Lanes*>(memory);
  panel.zeros = panel.scales + weight.groups;
  panel.sums = panel.zeros + weight.groups;
  panel.nibbles = reinterpret_cast<uint8_t*>(panel.sums + kMaxDigitRows);
  for (panel.begin = n_begin; panel.begin < n_end; panel.begin += kPanel) {
    panel.count = static_cast<int>(std::min<int64_t>(kPanel, n_end - panel.begin));
    for (int i = 0; i < kPanel; ++i) {
      panel.rows[i] = weight.qweight + std::min<int64_t>(panel.begin + i, weight.n - 1) * row_words;
    }
    load_scales(weight, panel.begin, panel.scales);
    load_zeros(weight, panel.begin, panel.zeros);
    begin_sums(job.epilogue, m_begin, m_end, panel);
    // Memory is the limit at small M, and hardware prefetchers stop at the end of a page: the next
    // panel is fetched into L2 while this one is multiplied. At the end there is none.
    const int64_t ahead = panel.begin + 2 * kPanel <= weight.n ? kPanel * row_words : 0;
    for (int64_t block = 0; block < job.blocks; ++block) {
      const int64_t word = block * kBlockWords;
      load_nibbles(panel.rows, word, std::min(kBlockWords, row_words - word), ahead, panel.nibbles);
      with_planes(job.planes,
                  [&]<int kPlanes>() { add_block<kPlanes>(job, block, m_begin, m_end, panel); });
    }
    store_sums(job, m_begin, m_end, panel);
  }
}

// Rows are prepared in the tiles in which add_block takes them: 16, at the end 8, 4, 2 and 1. A
// tile's digits lie side by side, so that they are read as one stream.
void prepare(const Int4DigitJob& job, float* values, int64_t begin, int64_t end) {
  with_planes(job.planes, [&]<int kPlanes>() {
    const int64_t terms = job.terms();
    for (int64_t rows = kTileRows; rows >= 1; rows /= 2) {
      const DigitStrides strides{kBlockWords * 2 * rows, 2 * rows, rows};
      for (; begin + rows <= end; begin += rows) {
        for (int64_t row = 0; row < rows; ++row) {
          float* statistics = job.statistics + begin * job.statistics_per_row() + row;
          const auto store = [&](int64_t segment, float scale, const TermSums& sums) {
            float* of_segment = statistics + segment * (1 + terms) * rows;
            of_segment[0] = scale;
            of_segment[rows] = sums.high;
            if (terms == 2) of_segment[2 * rows] = sums.low;
          };
          prepare_row<kPlanes>(job, begin + row, values, strides, kPlanes * strides.plane,
                               job.digits + begin * job.digits_per_row() + row, store);
        }
      }
    }
  });
}

}  // namespace

const Int4DigitKernels int4_panel_kernels = {true, prepare, gemm, scratch};

#else

const Int4DigitKernels int4_panel_kernels = {false, nullptr, nullptr, nullptr};

#endif

}  // namespace pumice::cpu::PUMICE_ISA
