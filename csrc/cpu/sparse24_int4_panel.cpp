// kernel: sparse24_int4_panel
//
// y = x · W^T + bias for packed 4-bit 2:4 weights, in integers: kept nibbles times the activations'
// digits (int4_activations.h), scaled where a group or a block of activations ends. Panels of
// weight rows walk along K in the lanes of registers (sparse24_int4_panel.h); the zeros are neither
// written out nor multiplied.
//
// Up to four rows of x are multiplied as the weight is decoded. For more a block of the panel is
// decoded into L1 and multiplied by tiles of rows.
//
// Floor at M = 1: the bytes of the weight over the bandwidth of memory, 3/4 of the dense weight's:
// N·K/4 of nibbles and N·K/8 of places. A Zen 4 core that reads 17 GB/s has 256 weights (with the
// zeros) every 21 cycles; in caches they take 21 with bf16 x and 28 with fp32.
//
// Floor with many rows: M·N·K/128 shuffles and as many vpdpbusd for each digit, a pair of them in
// 4/3 cycles on Zen 4: 5.3 for a row of x, two digits and 256 weights, where a dense product has
// 8 vpdpbusd, one a cycle; measured 6.5, dense 10.5. AVX2: 7, measured 12, dense 18.
#include <algorithm>
#include <cstring>

#include "cpu/element.h"
#include "cpu/int4_activations.h"
#include "cpu/int4_panel_columns.h"
#include "cpu/sparse24_int4_panel.h"
#include "cpu/sparse24_kernels.h"

namespace pumice::cpu::PUMICE_ISA {

#if defined(__AVX2__)

namespace {

constexpr int64_t kMostFewRows = 4;
constexpr int64_t kPlane = kBlockChunks * kChunk;  // bytes of a row's block

// f.template operator()<kSpan>(), so many chunks at a time surely share a group: a whole block, or
// as many as groups are multiples of.
template <typename F>
void with_span(const IntnWeight& kept, const F& f) {
  const int64_t group_size = 2 * kept.group_size;
  if (kept.groups == 1 || group_size % kActivationBlock == 0) return f.template operator()<8>();
  if (group_size % 64 == 0) return f.template operator()<4>();
  static_assert(2 * kGroupMultiple == 32);
  f.template operator()<2>();
}

// A tile of x, of which its digits are read as one stream: [block][plane][chunk][row][kChunk].
template <int kPlanes>
int64_t tile_of(int64_t rows_left) {
  if (rows_left >= kSparseTileRows<kPlanes>) return kSparseTileRows<kPlanes>;
  return rows_left >= 4 ? 4 : rows_left;
}

template <int kPlanes>
void prepare_rows(const Sparse24Int4Job& job, float* values, int64_t begin, int64_t end) {
  for (int64_t rows; begin < end; begin += rows) {
    rows = tile_of<kPlanes>(end - begin);
    for (int64_t row = 0; row < rows; ++row) {
      load_elements(job.x, job.dtype, (begin + row) * job.k, job.k, values);
      std::fill(values + job.k, values + job.blocks() * kActivationBlock, 0.0f);
      uint8_t* digits = job.digits + begin * job.digits_row() + row * kChunk;
      float* scales = job.scales + begin * job.blocks() + row;
      for (int64_t block = 0; block < job.blocks(); ++block, scales += rows) {
        const float* x = values + block * kActivationBlock;
        const BlockScale scale = block_scale<kPlanes>(x);
        *scales = scale.scale;
        alignas(64) int32_t q[kActivationBlock];
        round_block(x, scale.inverse, q);
        alignas(64) uint8_t planes[kPlanes][kActivationBlock];
        for (int p = kPlanes - 1; p >= 0; --p) {
          for (int64_t i = 0; i < kActivationBlock; ++i) {
            const int8_t digit = static_cast<int8_t>(q[i]);
            planes[p][i] = static_cast<uint8_t>(digit + 128);
            q[i] = (q[i] - digit) >> 8;
          }
        }
        for (const auto& plane : planes) {
          for (int64_t c = 0; c < kBlockChunks; ++c, digits += rows * kChunk) {
            std::memcpy(digits, plane + c * kChunk, kChunk);
          }
        }
      }
    }
  }
}

// f.template operator()<planes>(), of which there are two at least.
template <typename F>
void with_digits(const Sparse24Int4Job& job, const F& f) {
  with_planes(job.planes, [&]<int kPlanes>() {
    if constexpr (kPlanes > 1) f.template operator()<kPlanes>();
  });
}

void prepare(const Sparse24Int4Job& job, float* row, int64_t begin, int64_t end) {
  with_digits(job, [&]<int kPlanes>() { prepare_rows<kPlanes>(job, row, begin, end); });
}

// kPanel rows of packed weights or of places, a block of which is so many bytes.
template <int64_t kBlockBytes>
struct Rows {
  const uint8_t* rows[kPanel];
  const uint8_t* last[kPanel];  // of a last block that is not whole, filled up with zeros
  int64_t whole;                // blocks of a row
  int64_t ahead;                // bytes from a row to the one that is fetched
  alignas(64) uint8_t filled[kPanel][kBlockBytes];

  void take(const void* matrix, int64_t bytes, int64_t first, int64_t end) {
    whole = bytes / kBlockBytes;
    rows_of(matrix, bytes, first, end, rows);
    // Memory is the limit at small M: the next panel is fetched while this one is multiplied. At
    // the end there is none.
    ahead = first + 2 * kPanel <= end ? kPanel * bytes : 0;
    if (bytes % kBlockBytes == 0) return;
    std::memset(filled, 0, sizeof(filled));
    for (int i = 0; i < kPanel; ++i) {
      last[i] = filled[i];
      std::memcpy(filled[i], rows[i] + whole * kBlockBytes, bytes % kBlockBytes);
    }
  }

  inline __attribute__((always_inline)) void prefetch(int64_t block) const {
    if (block * kBlockBytes % 64 == 0) prefetch_rows(rows, block * kBlockBytes + ahead);
  }

  // Words 4·quad … 4·quad + 3 of a block's rows.
  inline __attribute__((always_inline)) void load(int64_t block, int64_t quad,
                                                  IntLanes (&words)[4]) const {
    const bool is_whole = block < whole;
    load_words(is_whole ? rows : last, (is_whole ? block * kBlockBytes : 0) + quad * kWordBytes,
               words);
  }
};

// The kPanel weight rows of columns of y, and their groups' parameters.
struct Panel {
  int64_t begin;
  int count;  // of columns that exist
  Rows<kActivationBlock / 4> words;
  Rows<kActivationBlock / 8> places;
  Lanes *scales, *zeros;  // [G]
  IntLanes* zero_bytes;   // [G], four times in a lane; 0 for float zero points
  const int32_t* groups;  // of each span
  Lanes bias;
};

// What is to be added to a span's products with digits, to which 128 was added: -128 · Σ (q -
// zero).
template <int kSpan>
inline IntLanes offset_of(IntLanes nibbles, IntLanes zero) {
  const IntLanes zeros = multiply(sum_bytes(zero), integers(2 * kSpan));  // of 8 · kSpan weights
  return multiply(subtract(sum_bytes(nibbles), zeros), integers(-128));
}

// The same of weights that are 1.
template <int kSpan>
inline IntLanes offset_of_ones() {
  return integers(-128 * 8 * kSpan);
}

// use(chunk, kept) for pairs of a block's chunks, and end(chunk, group, offset) after each span,
// with the first of its chunks.
template <int kSpan, typename Use, typename End>
inline __attribute__((always_inline)) void decode_block(const Panel& panel, int64_t block,
                                                        const Use& use, const End& end) {
  IntLanes places[4], words[4];
  panel.places.prefetch(block);
  panel.words.prefetch(block);
  panel.places.load(block, 0, places);
#pragma GCC unroll 4
  for (int first = 0; first < kBlockChunks; first += kSpan) {
    const int64_t group = panel.groups[(block * kBlockChunks + first) / kSpan];
    const IntLanes zero = panel.zero_bytes[group];
    IntLanes nibbles = integers(0);
#pragma GCC unroll 4
    for (int chunk = first; chunk < first + kSpan; chunk += 2) {
      if (chunk % 4 == 0) panel.words.load(block, chunk / 4, words);
      Kept kept[2];
      decode(words[chunk % 4], words[chunk % 4 + 1], places[chunk / 2], zero, kept, nibbles);
      use(chunk, kept);
    }
    end(first, group, offset_of<kSpan>(nibbles, zero));
  }
}

template <int kPlanes>
constexpr int kTerms = kPlanes / 2;

// Σ (q - zero)·x of a span from its terms, of which each is exact.
template <int kPlanes>
inline Lanes sum_of_terms(const Lanes (&terms)[kTerms<kPlanes>]) {
  if constexpr (kPlanes == 2) return terms[0];
  return multiply_add(terms[kTerms<kPlanes> - 1], broadcast(0x1p-16f), terms[0]);
}

// The kRows rows of x from m on, a tile, as the weight is decoded.
template <int kRows, int kPlanes, int kSpan>
__attribute__((noinline)) void multiply_few(const Sparse24Int4Job& job, const Panel& panel,
                                            int64_t m) {
  const uint8_t* x = job.digits + m * job.digits_row();
  const float* x_scales = job.scales + m * job.blocks();
  Lanes sums[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sums[r] = broadcast(0.0f);
  for (int64_t block = 0; block < job.blocks(); ++block, x_scales += kRows) {
    IntLanes products[kRows][kPlanes];
    const auto use = [&](int chunk, const Kept(&kept)[2]) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < kPlanes; ++p) {
          const uint8_t* digits = x + ((p * kBlockChunks + chunk) * kRows + r) * kChunk;
          IntLanes& sum = products[r][p];
          if (chunk % kSpan == 0) sum = integers(0);
          sum = add_products(sum, digits, kept[0]);
          sum = add_products(sum, digits + kRows * kChunk, kept[1]);
        }
      }
    };
    const auto end = [&](int, int64_t group, IntLanes offset) __attribute__((always_inline)) {
      const Lanes scale = panel.scales[group];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        Lanes terms[kTerms<kPlanes>];
#pragma GCC unroll 2
        for (int p = 0; p < kPlanes; p += 2) {
          const IntLanes high = times_256(add(products[r][p], offset));
          terms[p / 2] = to_float(add(high, add(products[r][p + 1], offset)));
        }
        sums[r] =
            multiply_add(sum_of_terms<kPlanes>(terms), scale * broadcast(x_scales[r]), sums[r]);
      }
    };
    decode_block<kSpan>(panel, block, use, end);
    x += kPlanes * kRows * kPlane;
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    store_columns(job.y, job.dtype, (m + r) * job.kept.n + panel.begin, panel.count,
                  sums[r] + panel.bias);
  }
}

// A block of a panel, decoded.
struct Block {
  Kept kept[kBlockChunks];
  Kept ones[kBlockChunks];         // at the same places, for the sums that float zeros multiply
  IntLanes offsets[kBlockChunks];  // of spans, where they begin
  int64_t groups[kBlockChunks];
};

// The products of a block with kRows rows of x, a tile.
template <int kRows, int kPlanes, int kSpan, bool kFloatZeros>
__attribute__((noinline)) void add_tile(const Panel& panel, const Block& block, const uint8_t* x,
                                        const float* x_scales, Lanes* sums) {
#pragma GCC unroll 1
  for (int first = 0; first < kBlockChunks; first += kSpan) {
    const int64_t group = block.groups[first];
    Lanes terms[kRows][kTerms<kPlanes>];
#pragma GCC unroll 2
    for (int t = 0; t < kTerms<kPlanes>; ++t) {
      const uint8_t* digits = x + (2 * t * kBlockChunks + first) * kRows * kChunk;
      IntLanes products[kRows];
      dot<kRows>(block.kept + first, digits, kSpan, block.offsets[first], products);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) terms[r][t] = to_float(products[r]);
      if constexpr (kFloatZeros) {  // Σ q·x - zero · Σ x
        const Lanes zero = panel.zeros[group];
        dot<kRows>(block.ones + first, digits, kSpan, offset_of_ones<kSpan>(), products);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          terms[r][t] = negative_multiply_add(zero, to_float(products[r]), terms[r][t]);
        }
      }
    }
    const Lanes scale = panel.scales[group];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      sums[r] =
          multiply_add(sum_of_terms<kPlanes>(terms[r]), scale * broadcast(x_scales[r]), sums[r]);
    }
  }
}

// f.template operator()<rows>(), rows those of a tile
template <typename F>
void with_rows(int64_t rows, const F& f) {
  if (rows == 1) return f.template operator()<1>();
  if (rows == 2) return f.template operator()<2>();
  if (rows == 3) return f.template operator()<3>();
  if (rows == 4) return f.template operator()<4>();
  f.template operator()<8>();
}

template <int kPlanes, int kSpan, bool kFloatZeros>
void multiply_tiles(const Sparse24Int4Job& job, const Panel& panel, Lanes* sums, int64_t m_begin,
                    int64_t m_end) {
  std::fill_n(sums, m_end - m_begin, broadcast(0.0f));
  Block decoded;
  for (int64_t block = 0; block < job.blocks(); ++block) {
    decode_block<kSpan>(
        panel, block,
        [&](int chunk, const Kept(&kept)[2]) __attribute__((always_inline)) {
#pragma GCC unroll 2
          for (int i = 0; i < 2; ++i) {
            decoded.kept[chunk + i] = for_tiles(kept[i]);
            if (kFloatZeros) decoded.ones[chunk + i] = ones_at(decoded.kept[chunk + i]);
          }
        },
        [&](int first, int64_t group, IntLanes offset) __attribute__((always_inline)) {
          decoded.offsets[first] = offset;
          decoded.groups[first] = group;
        });
    for (int64_t m = m_begin, rows; m < m_end; m += rows) {
      rows = tile_of<kPlanes>(m_end - m);
      const uint8_t* x = job.digits + m * job.digits_row() + block * kPlanes * rows * kPlane;
      const float* x_scales = job.scales + m * job.blocks() + block * rows;
      with_rows(rows, [&]<int kRows>() {
        if constexpr (kRows <= std::max(4, kSparseTileRows<kPlanes>)) {
          add_tile<kRows, kPlanes, kSpan, kFloatZeros>(panel, decoded, x, x_scales,
                                                       sums + (m - m_begin));
        }
      });
    }
  }
  for (int64_t m = m_begin; m < m_end; ++m) {
    store_columns(job.y, job.dtype, m * job.kept.n + panel.begin, panel.count,
                  sums[m - m_begin] + panel.bias);
  }
}

template <int kPlanes, int kSpan>
void multiply(const Sparse24Int4Job& job, const Panel& panel, Lanes* sums, int64_t m_begin,
              int64_t m_end) {
  if (job.kept.zero_kind == ZeroKind::kFloat) {
    multiply_tiles<kPlanes, kSpan, true>(job, panel, sums, m_begin, m_end);
  } else if (m_end - m_begin > kMostFewRows) {
    multiply_tiles<kPlanes, kSpan, false>(job, panel, sums, m_begin, m_end);
  } else {
    with_rows(m_end - m_begin, [&]<int kRows>() {
      if constexpr (kRows <= kMostFewRows) multiply_few<kRows, kPlanes, kSpan>(job, panel, m_begin);
    });
  }
}

int64_t scratch(const Sparse24Int4Job& job) {
  return (3 * job.kept.groups + kMaxDigitRows) * kPanel + job.blocks() * kBlockChunks;
}

template <int kSpan>
void multiply_columns(const Sparse24Int4Job& job, float* memory, int64_t m_begin, int64_t m_end,
                      int64_t n_begin, int64_t n_end) {
  const IntnWeight& kept = job.kept;
  Panel panel;
  panel.scales = reinterpret_cast<Lanes*>(memory);
  panel.zeros = panel.scales + kept.groups;
  panel.zero_bytes = reinterpret_cast<IntLanes*>(panel.zeros + kept.groups);
  Lanes* sums = panel.zeros + 2 * kept.groups;
  int32_t* groups = reinterpret_cast<int32_t*>(sums + kMaxDigitRows);
  for (int64_t span = 0; span < job.blocks() * (kBlockChunks / kSpan); ++span) {
    const int64_t group = span * kSpan * kChunk / (2 * kept.group_size);
    groups[span] = static_cast<int32_t>(std::min(group, kept.groups - 1));
  }
  panel.groups = groups;
  for (panel.begin = n_begin; panel.begin < n_end; panel.begin += kPanel) {
    panel.count = static_cast<int>(std::min<int64_t>(kPanel, n_end - panel.begin));
    panel.words.take(kept.qweight, intn_words(kept.k, 4) * 4, panel.begin, kept.n);
    panel.places.take(job.meta, sparse24_meta_bytes(job.k), panel.begin, kept.n);
    load_scales(kept, panel.begin, panel.scales);
    if (kept.zero_kind != ZeroKind::kMiddle || panel.begin == n_begin) {
      load_zeros(kept, panel.begin, panel.zeros);
      for (int64_t g = 0; g < kept.groups; ++g) {
        const bool of_bytes = kept.zero_kind != ZeroKind::kFloat;
        panel.zero_bytes[g] = of_bytes ? four_times(panel.zeros[g]) : integers(0);
      }
    }
    panel.bias = load_bias(job.bias, panel.begin, panel.count);
    with_digits(job,
                [&]<int kPlanes>() { multiply<kPlanes, kSpan>(job, panel, sums, m_begin, m_end); });
  }
}

void gemm(const Sparse24Int4Job& job, float* memory, int64_t m_begin, int64_t m_end,
          int64_t n_begin, int64_t n_end) {
  with_span(job.kept, [&]<int kSpan>() {
    multiply_columns<kSpan>(job, memory, m_begin, m_end, n_begin, n_end);
  });
}

}  // namespace

const Sparse24Int4Kernels sparse24_int4_kernels = {true, prepare, gemm, scratch};

#else

const Sparse24Int4Kernels sparse24_int4_kernels = {false, nullptr, nullptr, nullptr};

#endif

}  // namespace pumice::cpu::PUMICE_ISA
