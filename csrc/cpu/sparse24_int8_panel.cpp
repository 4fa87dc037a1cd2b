// kernel: sparse24_int8_panel
//
// y = ((q @ W^T) · scale) · weight_scale + bias for int8 2:4 weights and more rows of q than a few.
//
// kRowLanes weight rows lie side by side in the lanes of a register: eight columns of q are
// broadcast to all of them, and each row picks the four it kept, by a shuffle whose indices belong
// to the weights. They are decoded once for all rows of q, into a block that stays in L1: nothing
// is written out dense.
//
// Floor, many rows: a shuffle and a vpdpbusd for each 128 multiplications of the dense product,
// which takes two vpdpbusd for them. On Zen 4 the one runs on two units, the other on two, of which
// they share one: 4/3 cycles. 4096², M = 128, one thread at 3.7 GHz: 6.1 ms, and 0.6 ms to decode;
// measured 7.2 ms (in cache; the dense kernel 10.4). AVX2: two shuffles, products and sums for each
// 64: 12.6 ms; measured 20.5 ms, for the units are not shared out evenly (dense 28.7).
#include <algorithm>
#include <cstring>

#include "cpu/element.h"
#include "cpu/sparse24_int8_panel.h"
#include "cpu/sparse24_kernels.h"
#include "cpu/sparse24_tile.h"

namespace pumice::cpu::PUMICE_ISA {

#if defined(__AVX2__)

namespace {

constexpr int64_t kWordColumns = kWordSteps * kStepColumns;  // of a word of meta
constexpr int64_t kLoadColumns = 4 * kWordColumns;           // of the words that are loaded at once
constexpr int64_t kBlockColumns = 1024;                      // their steps take 16 KB
constexpr int64_t kBlockSteps = kBlockColumns / kStepColumns;
// Of x, while a block of its columns is multiplied by the panels of a chunk of y: they stay in L2.
constexpr int64_t kMaxRows = 256;
constexpr int64_t kChunkPanels = 64 / kRowLanes;

int64_t padded(int64_t k) { return (k + kWordColumns - 1) / kWordColumns * kWordColumns; }

int64_t prepared_row(int64_t k) { return padded(k) * int64_t{sizeof(PanelElement)}; }

void prepare(const Sparse24Int8Job& job, int64_t begin, int64_t end) {
  const int64_t stride = padded(job.k);
  for (int64_t m = begin; m < end; ++m) {
    const int8_t* q = job.q + m * job.k;
    PanelElement* x = reinterpret_cast<PanelElement*>(job.prepared) + m * stride;
    for (int64_t k = 0; k < job.k; ++k) x[k] = prepare_element(q[k]);
    std::fill(x + job.k, x + stride, PanelElement{0});  // the weights are zero there
  }
}

// kRowLanes columns of y: the weight rows and the sums of so many rows of x.
struct Panel {
  const uint8_t* values[kRowLanes];
  const uint8_t* meta[kRowLanes];
  int64_t values_ahead, meta_ahead;  // bytes from a row to that of the next panel
  RowWords correction;
  RowWords sums[kMaxRows];
};

struct Scratch {
  Step steps[kBlockSteps];
  Panel panels[kChunkPanels];
};

int64_t scratch() { return sizeof(Scratch); }

// f(meta, values, k) for each word of meta of the `columns` columns of the panel from `begin` on, a
// multiple of kLoadColumns: k columns behind `begin`.
template <bool kFetchValues, typename F>
inline __attribute__((always_inline)) void for_words(Panel& panel, int64_t begin, int64_t columns,
                                                     const F& f) {
  RowWords correction = panel.correction;
  for (int64_t k = 0; k < columns; k += kLoadColumns) {
    const int64_t at = begin + k, left = columns - k;
    if constexpr (kFetchValues) prefetch_rows(panel.values, at / 2 + panel.values_ahead);
    if (at % (4 * kLoadColumns) == 0) prefetch_rows(panel.meta, at / 8 + panel.meta_ahead);
    RowWords meta[4], values[4];
    if (left >= kLoadColumns) {
      load_words(panel.meta, at / 8, meta);
    } else {
      load_words(panel.meta, at / 8, sparse24_meta_bytes(left), meta);
    }
    for (int i = 0; i < 4 && i * kWordColumns < left; ++i) {
      const int64_t kept = (left - i * kWordColumns) / 2;
      const int64_t byte = (at + i * kWordColumns) / 2;
      if (kept >= kWordBytes) {
        load_words(panel.values, byte, values);
      } else {
        load_words(panel.values, byte, kept, values);
      }
      correction = add_correction(correction, values);
      f(meta[i], values, k + i * kWordColumns);
    }
  }
  panel.correction = correction;
}

const PanelElement* row_of(const Sparse24Int8Job& job, int64_t m) {
  return reinterpret_cast<const PanelElement*>(job.prepared) + m * padded(job.k);
}

// The sums of kRows rows of x from row m on, in registers from the first column to the last: each
// step is used once, where it is decoded.
template <int kRows>
void multiply_at_once(const Sparse24Int8Job& job, int64_t m, Panel& panel) {
  const int64_t stride = padded(job.k);
  const PanelElement* x = row_of(job, m);
  RowWords sums[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sums[r] = RowWords{};
  for_words<true>(panel, 0, job.k,
                  [&](RowWords meta, const RowWords(&values)[kWordSteps], int64_t k)
                      __attribute__((always_inline)) {
                        Step steps[kWordSteps];
                        decode(meta, values, steps);
#pragma GCC unroll 4
                        for (int s = 0; s < kWordSteps; ++s) {
                          add_step(steps[s], x + k + s * kStepColumns, stride, sums);
                        }
                      });
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) panel.sums[r] = sums[r];
}

// Values of the panel to come, fetched while a block is multiplied: the memory must not wait for
// its end. The tiles of rows share the lines.
struct Fetch {
  const uint8_t* const* rows;
  int64_t at;           // what is multiplied, so many bytes from their beginnings
  int64_t step, steps;  // of the lines every steps-th
};

template <int kRows>
void multiply_tile(const Step* steps, int64_t count, const PanelElement* x, int64_t stride,
                   Fetch fetch, RowWords* all) {
  RowWords sums[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sums[r] = all[r];
  const int64_t lines = count * kStepColumns / kLoadColumns * kRowLanes;
  for (int64_t s = 0; s < count; ++s) {
    const int64_t line = fetch.step + s * fetch.steps;
    if (line < lines) {
      _mm_prefetch(fetch.rows[line % kRowLanes] + fetch.at + line / kRowLanes * 64, _MM_HINT_T1);
    }
    add_step(steps[s], x + s * kStepColumns, stride, sums);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) all[r] = sums[r];
}

// f.operator()<rows>(), rows at most kTileRows.
template <int kRows = kTileRows, typename F>
void with_rows(int64_t rows, const F& f) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      f.template operator()<kRows>();
    } else {
      with_rows<kRows - 1>(rows, f);
    }
  }
}

// Adds the products of columns [k, k + columns) with all rows of x, in tiles as equal as can be.
void multiply_block(const Sparse24Int8Job& job, Step* steps, int64_t k, int64_t columns,
                    int64_t begin, int64_t end, Panel& panel) {
  for_words<false>(
      panel, k, columns,
      [&](RowWords meta, const RowWords(&values)[kWordSteps], int64_t at)
          __attribute__((always_inline)) { decode(meta, values, steps + at / kStepColumns); });
  const int64_t rows = end - begin, tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t fetching = std::min<int64_t>(tiles, 4);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = rows * i / tiles;
    const Fetch fetch{panel.values, k / 2 + panel.values_ahead, i < fetching ? i : kBlockColumns,
                      fetching};
    with_rows(rows * (i + 1) / tiles - first, [&]<int kRows>() {
      multiply_tile<kRows>(steps, padded(columns) / kStepColumns, row_of(job, begin + first) + k,
                           padded(job.k), fetch, panel.sums + first);
    });
  }
}

// Columns n … of y, before n_end, of rows [begin, end).
void store_panel(const Sparse24Int8Job& job, const Panel& panel, int64_t n, int64_t n_end,
                 int64_t begin, int64_t end) {
  const int count = static_cast<int>(std::min<int64_t>(kRowLanes, n_end - n));
  Float4 weight_scale[kRowLanes / 4], bias[kRowLanes / 4];
  for (int i = 0; i < count; i += 4) {
    bias[i / 4] = load_four(job.bias, n + i, std::min(4, count - i));
    for (int j = 0; j < 4; ++j) {
      const int64_t column = std::min<int64_t>(n + i + j, n + count - 1);
      weight_scale[i / 4][j] = job.weight_scale[column * job.weight_scale_stride];
    }
  }
  for (int64_t m = begin; m < end; ++m) {
    alignas(RowWords) int32_t sums[kRowLanes];
    const RowWords exact = exact_sums(panel.sums[m - begin], panel.correction);
    std::memcpy(sums, &exact, sizeof(sums));
    const float scale = job.scale[m * job.scale_stride];
    for (int i = 0; i < count; i += 4) {
      Float4 value;
      for (int j = 0; j < 4; ++j) value[j] = static_cast<float>(sums[i + j]) * scale;
      store_four(job.y, job.y_dtype, m * job.n + n + i, std::min(4, count - i),
                 value * weight_scale[i / 4] + bias[i / 4]);
    }
  }
}

void begin_panel(const Sparse24Int8Job& job, int64_t n, int64_t n_end, int64_t rows, Panel& panel) {
  const int64_t values_bytes = job.k / 2, meta_bytes = sparse24_meta_bytes(job.k);
  rows_of(job.values, values_bytes, n, n_end, panel.values);
  rows_of(job.meta, meta_bytes, n, n_end, panel.meta);
  const int64_t ahead = n + 2 * kRowLanes <= job.n ? kRowLanes : 0;  // behind the last none
  panel.values_ahead = ahead * values_bytes;
  panel.meta_ahead = ahead * meta_bytes;
  panel.correction = RowWords{};
  std::fill_n(panel.sums, rows, RowWords{});
}

// Panels of the columns [n_begin, n_end), at most kChunkPanels, a block of K after the other: a
// block of the columns of x is read from L2 by all of them.
void multiply_chunk(const Sparse24Int8Job& job, Scratch& memory, int64_t m_begin, int64_t m_end,
                    int64_t n_begin, int64_t n_end) {
  const int64_t panels = (n_end - n_begin + kRowLanes - 1) / kRowLanes;
  for (int64_t p = 0; p < panels; ++p) {
    begin_panel(job, n_begin + p * kRowLanes, n_end, m_end - m_begin, memory.panels[p]);
  }
  for (int64_t k = 0; k < job.k; k += kBlockColumns) {
    const int64_t columns = std::min(kBlockColumns, job.k - k);
    for (int64_t p = 0; p < panels; ++p) {
      multiply_block(job, memory.steps, k, columns, m_begin, m_end, memory.panels[p]);
    }
  }
  for (int64_t p = 0; p < panels; ++p) {
    store_panel(job, memory.panels[p], n_begin + p * kRowLanes, n_end, m_begin, m_end);
  }
}

void gemm(const Sparse24Int8Job& job, void* scratch, int64_t m_begin, int64_t m_end,
          int64_t n_begin, int64_t n_end) {
  Scratch& memory = *static_cast<Scratch*>(scratch);
  const int64_t rows = m_end - m_begin;
  if (rows <= kTileRows) {
    for (int64_t n = n_begin; n < n_end; n += kRowLanes) {
      Panel& panel = memory.panels[0];
      begin_panel(job, n, n_end, 0, panel);
      with_rows(rows, [&]<int kRows>() { multiply_at_once<kRows>(job, m_begin, panel); });
      store_panel(job, panel, n, n_end, m_begin, m_end);
    }
    return;
  }
  // Not many rows wait for the weights, which are read in their order in memory then.
  constexpr int64_t kRowsInOrder = 32;
  const int64_t chunk = (rows <= kRowsInOrder ? 1 : kChunkPanels) * kRowLanes;
  for (int64_t n = n_begin; n < n_end; n += chunk) {
    multiply_chunk(job, memory, m_begin, m_end, n, std::min(n + chunk, n_end));
  }
}

}  // namespace

const Sparse24Int8PanelKernels sparse24_int8_panel_kernels = {
    true, kMaxRows, kChunkPanels * kRowLanes, prepared_row, prepare, scratch, gemm};

#else

const Sparse24Int8PanelKernels sparse24_int8_panel_kernels = {};

#endif

}  // namespace pumice::cpu::PUMICE_ISA
