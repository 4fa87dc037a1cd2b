// kernel: sparse24_float_panel
//
// y = x · W^T + bias for floating-point 2:4 weights and more than a few rows of x: panels of weight
// rows in the lanes of registers (sparse24_float_panel.h), summed in fp32. Nothing is written out
// dense; the zeros are not multiplied.
//
// Floor: a shuffle and a product for each 64 (AVX-512) multiply-adds of the dense product in bf16,
// two of each in fp32, where dense kernels need two and four products. Zen 4 multiplies on two
// ports, shuffles on two, and has one of them in common: 1.33 and 2.67 cycles, two thirds of dense.
// And the bytes of the kept weights and places, as for few rows. 4096², one thread at 3.7 GHz
// beside busy neighbours, ms:
//
//             M = 16                      M = 128
//             floor   here   torch        floor   here   torch
//   bf16      1.5     2.5    4.8          12.1    15.0   21.2      AVX512-BF16, as torch
//   fp16      3.0     5.4    23           24.2    33     181
//   fp32      3.0     5.7    13.7         24.2    33     60
//   fp32      3.0     6.5    13.9         24.2    39     60        AVX2, as torch
//
// What few rows lack is the decoding: some 6 (bf16) and 11 (fp32) cycles of each group of sixteen
// rows, which M rows share.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/sparse24_float_panel.h"
#include "cpu/sparse24_kernels.h"

namespace pumice::cpu::PUMICE_ISA {

#if defined(__AVX2__)

namespace {

template <typename F>
auto with_dtype(DType dtype, const F& f) {
  if (dtype == DType::kFloat32) return f.template operator()<DType::kFloat32>();
  if (dtype == DType::kFloat16) return f.template operator()<DType::kFloat16>();
  return f.template operator()<DType::kBFloat16>();
}

// Tile t of x holds rows [tile_row(t), tile_row(t + 1)): as even as can be, for a row alone costs
// as much as three.
int64_t tile_row(const Sparse24FloatJob& job, int64_t tile) {
  return with_dtype(job.dtype, [&]<DType kDtype>() {
    const int64_t tiles = (job.m + kTileRows<GroupOf<kDtype>> - 1) / kTileRows<GroupOf<kDtype>>;
    return job.m * tile / tiles;
  });
}

int64_t few_rows(DType dtype) {
  return with_dtype(dtype, []<DType kDtype>() { return kFewRows<GroupOf<kDtype>, kDtype>; });
}

Sparse24PanelShape shape(DType dtype) {
  return with_dtype(dtype, []<DType kDtype>() {
    using Group = GroupOf<kDtype>;
    return Sparse24PanelShape{kTileRows<Group>, kPanels<Group> * kRowLanes,
                              static_cast<int64_t>(sizeof(typename Group::Element))};
  });
}

// x of a tile becomes [K/4][rows][4], so that the tile reads it as one stream.
template <DType kDtype>
void prepare_tile(const Sparse24FloatJob& job, int64_t begin, int64_t end) {
  using Element = typename GroupOf<kDtype>::Element;
  constexpr int64_t kColumns = 256;  // at a time
  constexpr int64_t kFour = kSparse24Group;
  const int64_t rows = end - begin;
  Element values[kTileRows<GroupOf<kDtype>>][kColumns];
  Element* out = static_cast<Element*>(job.prepared) + begin * job.k;
  for (int64_t k = 0; k < job.k; k += kColumns) {
    const int64_t count = std::min(kColumns, job.k - k);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t from = (begin + r) * job.k + k;
      if constexpr (std::is_same_v<Element, float>) {
        load_elements(job.x, kDtype, from, count, values[r]);
      } else {
        std::memcpy(values[r], static_cast<const Element*>(job.x) + from,
                    static_cast<size_t>(count) * sizeof(Element));
      }
    }
    for (int64_t i = 0; i < count; i += kFour) {
      for (int64_t r = 0; r < rows; ++r, out += kFour) {
        std::memcpy(out, values[r] + i, kFour * sizeof(Element));
      }
    }
  }
}

void prepare(const Sparse24FloatJob& job, int64_t tile_begin, int64_t tile_end) {
  with_dtype(job.dtype, [&]<DType kDtype>() {
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      prepare_tile<kDtype>(job, tile_row(job, tile), tile_row(job, tile + 1));
    }
  });
}

// The weight rows of panels side by side.
template <typename Group>
struct PanelRows {
  int64_t values_bytes, meta_bytes;  // of a row
  const uint8_t* values[kPanels<Group>][kRowLanes];
  const uint8_t* meta[kPanels<Group>][kRowLanes];

  PanelRows(const Sparse24FloatJob& job, int64_t column)
      : values_bytes(job.k / 2 * size_of(job.dtype)), meta_bytes(sparse24_meta_bytes(job.k)) {
    for (int64_t p = 0; p < kPanels<Group>; ++p) {
      rows_of(job.values, values_bytes, column + p * kRowLanes, job.n, values[p]);
      rows_of(job.meta, meta_bytes, column + p * kRowLanes, job.n, meta[p]);
    }
  }
};

// `count` groups of a panel's rows from group `begin` of K on: out[0], out[kPanels], …
template <typename Group, DType kDtype>
void decode(const PanelRows<Group>& rows, int64_t panel, int64_t begin, int64_t count, Group* out) {
  constexpr int64_t kPairBytes = 2 * size_of(kDtype), kSquare = kRowLanes * 4 / kPairBytes;
  RowWords meta[(kBlockGroups<Group> + 31) / 32 * 4];  // of eight groups each
  for (int64_t g = 0; g < count; g += 32) {
    const int64_t at = (begin + g) / 2, left = rows.meta_bytes - at;
    RowWords words[4];
    if (left >= kWordBytes) {
      load_words(rows.meta[panel], at, words);
    } else {
      load_words(rows.meta[panel], at, left, words);
    }
    std::copy_n(words, 4, meta + g / 8);
  }
  for (int64_t g = 0; g < count; g += kSquare) {
    const int64_t at = (begin + g) * kPairBytes;
    RowWords words[kRowLanes];
    load_square(rows.values[panel], at, rows.values_bytes - at, words);
#pragma GCC unroll 16
    for (int64_t j = 0; j < kSquare; ++j) {
      Group& group = out[(g + j) * kPanels<Group>];
      group.set_places(meta[(g + j) / 8], static_cast<int>((g + j) % 8));
      if constexpr (kDtype == DType::kFloat32) {
        group.set_kept(words[2 * j], words[2 * j + 1]);
      } else {
        group.template set_kept<kDtype>(words[j]);
      }
    }
  }
}

// What is decoded next, `rows` rows of values and of meta: fetched into L2 row by row while tiles
// are multiplied, since hardware prefetchers stop at the end of a page, and many prefetches at a
// time would wait for memory.
struct Fetch {
  const uint8_t* values;
  const uint8_t* meta;
  int64_t values_bytes, meta_bytes;  // of a row
  int64_t block_bytes;               // of values
  int64_t rows;

  // Always inline: GCC takes a function of prefetches alone for one without effects, and drops the
  // call.
  inline __attribute__((always_inline)) void row(int64_t i) const {
    __builtin_prefetch(meta + i * meta_bytes, 0, 2);
    for (int64_t at = 0; at < block_bytes; at += 64) {
      __builtin_prefetch(values + i * values_bytes + at, 0, 2);
    }
  }
};

// sums[row][panel] += Σ over `count` groups of what the panels' rows keep · x of the row.
template <typename Group, int kRows>
void add_tile(const Group* groups, const typename Group::Element* x, int64_t count,
              const Fetch& fetch, Lanes* sums) {
  constexpr int kSide = kPanels<Group>, kFour = kSparse24Group;
  constexpr int64_t kFetched = kSide * kRowLanes;
  Lanes acc[kRows][kSide];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < kSide; ++p) acc[r][p] = zero_lanes();
  }
  int64_t fetched = 0;
  for (int64_t g = 0; g < count; ++g, groups += kSide, x += kRows * kFour) {
    const int64_t until = std::min(fetch.rows, (g + 1) * kFetched / kBlockGroups<Group>);
    for (; fetched < until; ++fetched) fetch.row(fetched);
#pragma GCC unroll 2
    for (int step = 0; step < Group::kSteps; ++step) {
      RowWords places[kSide];
      Lanes kept[kSide];
#pragma GCC unroll 4
      for (int p = 0; p < kSide; ++p) {
        places[p] = in_register(groups[p].places[step]);
        kept[p] = in_register(groups[p].kept[step]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Lanes four = Group::broadcast(x + r * kFour);
#pragma GCC unroll 4
        for (int p = 0; p < kSide; ++p) {
          acc[r][p] = Group::multiply_add(four, places[p], kept[p], acc[r][p]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < kSide; ++p) sums[r * kSide + p] = add(sums[r * kSide + p], acc[r][p]);
  }
}

template <typename Group, int kRows = kTileRows<Group>>
void add_tile(int64_t rows, const Group* groups, const typename Group::Element* x, int64_t count,
              const Fetch& fetch, Lanes* sums) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return add_tile<Group, kRows - 1>(rows, groups, x, count, fetch, sums);
  }
  add_tile<Group, kRows>(groups, x, count, fetch, sums);
}

int64_t scratch_bytes(DType dtype, int64_t rows) {
  return with_dtype(dtype, [&]<DType kDtype>() {
    using Group = GroupOf<kDtype>;
    return kPanels<Group> *
           static_cast<int64_t>(kBlockGroups<Group> * sizeof(Group) + rows * sizeof(Lanes));
  });
}

template <DType kDtype>
void store(const Sparse24FloatJob& job, int64_t m_begin, int64_t m_end, int64_t column,
           int64_t columns, const Lanes* sums) {
  constexpr int kSide = kPanels<GroupOf<kDtype>>;
  alignas(64) float bias[kSide * kRowLanes] = {};
  if (job.bias.data) load_elements(job.bias.data, job.bias.dtype, column, columns, bias);
  for (int64_t m = m_begin; m < m_end; ++m) {
    for (int64_t p = 0; p * kRowLanes < columns; ++p) {
      const int count = static_cast<int>(std::min<int64_t>(kRowLanes, columns - p * kRowLanes));
      store_lanes<kDtype>(job.y, m * job.n + column + p * kRowLanes, count,
                          add(sums[(m - m_begin) * kSide + p], load_lanes(bias + p * kRowLanes)));
    }
  }
}

// Columns [column, column + columns) of y, as many as panels lie side by side.
template <DType kDtype>
void multiply(const Sparse24FloatJob& job, GroupOf<kDtype>* groups, Lanes* sums, int64_t tile_begin,
              int64_t tile_end, int64_t column, int64_t columns) {
  using Group = GroupOf<kDtype>;
  constexpr int64_t kSide = kPanels<Group>, kBlock = kBlockGroups<Group>;
  constexpr int64_t kPairBytes = 2 * size_of(kDtype);
  const PanelRows<Group> rows(job, column);
  const int64_t m_begin = tile_row(job, tile_begin), m_end = tile_row(job, tile_end);
  std::fill_n(sums, (m_end - m_begin) * kSide, zero_lanes());
  const int64_t all = job.k / kSparse24Group;
  for (int64_t begin = 0; begin < all; begin += kBlock) {
    const int64_t count = std::min(kBlock, all - begin);
    for (int64_t p = 0; p < kSide; ++p) decode<Group, kDtype>(rows, p, begin, count, groups + p);
    // The next block of these rows or the first of the rows below.
    const int64_t below = begin + kBlock < all ? 0 : kSide * kRowLanes;
    const int64_t next = below ? 0 : begin + kBlock;
    Fetch fetch{rows.values[0][0] + below * rows.values_bytes + next * kPairBytes,
                rows.meta[0][0] + below * rows.meta_bytes + next / 2,
                rows.values_bytes,
                rows.meta_bytes,
                kBlock * kPairBytes,
                std::min(kSide * kRowLanes, job.n - column - below)};
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      const int64_t m = tile_row(job, tile), m_rows = tile_row(job, tile + 1) - m;
      const auto* x = static_cast<const typename Group::Element*>(job.prepared) + m * job.k;
      add_tile<Group>(m_rows, groups, x + begin * m_rows * kSparse24Group, count, fetch,
                      sums + (m - m_begin) * kSide);
      fetch.rows = 0;
    }
  }
  store<kDtype>(job, m_begin, m_end, column, columns, sums);
}

void gemm(const Sparse24FloatJob& job, void* scratch, int64_t tile_begin, int64_t tile_end,
          int64_t begin, int64_t end) {
  with_dtype(job.dtype, [&]<DType kDtype>() {
    using Group = GroupOf<kDtype>;
    constexpr int64_t kColumns = kPanels<Group> * kRowLanes;
    Group* groups = static_cast<Group*>(scratch);
    Lanes* sums = reinterpret_cast<Lanes*>(groups + kPanels<Group> * kBlockGroups<Group>);
    for (int64_t n = begin; n < end; n += kColumns) {
      multiply<kDtype>(job, groups, sums, tile_begin, tile_end, n, std::min(kColumns, end - n));
    }
  });
}

}  // namespace

const Sparse24FloatPanelKernels sparse24_float_panel_kernels = {true,          few_rows, shape,
                                                                scratch_bytes, prepare,  gemm};

#else

namespace {

int64_t few_rows(DType /*dtype*/) { return 4; }

}  // namespace

const Sparse24FloatPanelKernels sparse24_float_panel_kernels = {false,   few_rows, nullptr,
                                                                nullptr, nullptr,  nullptr};

#endif

}  // namespace pumice::cpu::PUMICE_ISA
