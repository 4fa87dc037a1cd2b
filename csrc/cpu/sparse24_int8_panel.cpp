// kernel: sparse24_int8_panel
//
// y = ((q @ W^T) · scale) · weight_scale + bias for int8 2:4 weights and more rows of q than a few.
//
// kRowLanes weight rows lie side by side in the lanes of a register: eight columns of q are
// broadcast to all of them, and each row picks the four it kept, by a shuffle whose indices belong
// to the weights. They are decoded once for all rows of q, into a block that stays in L1: nothing
// is written out dense.
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
  RowWords correction;
  RowWords sums[kMaxRows];
};

struct Scratch {
  Step steps[kBlockSteps];
  Panel panels[kChunkPanels];
};

int64_t scratch() { return sizeof(Scratch); }

// The steps of `columns` columns of the panel from `begin` on, a multiple of kLoadColumns.
void decode_block(Panel& panel, int64_t begin, int64_t columns, int64_t ahead, int64_t meta_ahead,
                  Step* steps) {
  RowWords correction = panel.correction;
  for (int64_t k = 0; k < columns; k += kLoadColumns) {
    const int64_t at = begin + k, left = columns - k;
    prefetch_rows(panel.values, at / 2 + ahead);
    if (at % (4 * kLoadColumns) == 0) prefetch_rows(panel.meta, at / 8 + meta_ahead);
    RowWords meta[4], values[4];
    if (left >= kLoadColumns) {
      load_words(panel.meta, at / 8, meta);
    } else {
      load_words(panel.meta, at / 8, sparse24_meta_bytes(left), meta);
    }
    for (int i = 0; i < 4 && i * kWordColumns < left; ++i, steps += kWordSteps) {
      const int64_t kept = (left - i * kWordColumns) / 2;
      const int64_t byte = (at + i * kWordColumns) / 2;
      if (kept >= kWordBytes) {
        load_words(panel.values, byte, values);
      } else {
        load_words(panel.values, byte, kept, values);
      }
      decode(meta[i], values, steps);
      correction = add_correction(correction, values);
    }
  }
  panel.correction = correction;
}

// Adds the products of the steps with rows [begin, end) of x from column `first` on.
void multiply_block(const Sparse24Int8Job& job, const Step* steps, int64_t count, int64_t first,
                    int64_t begin, int64_t end, RowWords* sums) {
  const int64_t stride = padded(job.k);
  const PanelElement* x = reinterpret_cast<const PanelElement*>(job.prepared) + first;
  int64_t m = begin;
  const auto tiles = [&]<int kRows>() {
    for (; m + kRows <= end; m += kRows) {
      add_products<kRows>(steps, count, x + m * stride, stride, sums + (m - begin));
    }
  };
  if constexpr (kTileRows == 8) tiles.template operator()<8>();
  tiles.template operator()<4>();
  tiles.template operator()<2>();
  tiles.template operator()<1>();
}

// Columns n … of y, `count` of them, of rows [begin, end).
void store_panel(const Sparse24Int8Job& job, const Panel& panel, int64_t n, int count,
                 int64_t begin, int64_t end) {
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

// Rows [m_begin, m_end), at most kMaxRows, of columns [n_begin, n_end), at most those of a chunk.
void multiply_chunk(const Sparse24Int8Job& job, Scratch& memory, int64_t m_begin, int64_t m_end,
                    int64_t n_begin, int64_t n_end) {
  const int64_t row_bytes = job.k / 2, meta_bytes = sparse24_meta_bytes(job.k);
  const int64_t panels = (n_end - n_begin + kRowLanes - 1) / kRowLanes;
  for (int64_t p = 0; p < panels; ++p) {
    Panel& panel = memory.panels[p];
    rows_of(job.values, row_bytes, n_begin + p * kRowLanes, n_end, panel.values);
    rows_of(job.meta, meta_bytes, n_begin + p * kRowLanes, n_end, panel.meta);
    panel.correction = RowWords{};
    std::fill_n(panel.sums, m_end - m_begin, RowWords{});
  }
  for (int64_t k = 0; k < job.k; k += kBlockColumns) {
    const int64_t columns = std::min(kBlockColumns, job.k - k);
    const int64_t steps = padded(columns) / kStepColumns;
    for (int64_t p = 0; p < panels; ++p) {
      // The panel after this one is fetched meanwhile. Behind the last there is none.
      const bool last = n_begin + (p + 2) * kRowLanes > job.n;
      const int64_t ahead = last ? 0 : kRowLanes;
      Panel& panel = memory.panels[p];
      decode_block(panel, k, columns, ahead * row_bytes, ahead * meta_bytes, memory.steps);
      multiply_block(job, memory.steps, steps, k, m_begin, m_end, panel.sums);
    }
  }
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t n = n_begin + p * kRowLanes;
    const int count = static_cast<int>(std::min<int64_t>(kRowLanes, n_end - n));
    store_panel(job, memory.panels[p], n, count, m_begin, m_end);
  }
}

void gemm(const Sparse24Int8Job& job, void* scratch, int64_t m_begin, int64_t m_end,
          int64_t n_begin, int64_t n_end) {
  Scratch& memory = *static_cast<Scratch*>(scratch);
  // Few rows wait for the weights, which are read in their order in memory then.
  constexpr int64_t kRowsInOrder = 32;
  const int64_t chunk = (m_end - m_begin <= kRowsInOrder ? 1 : kChunkPanels) * kRowLanes;
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
