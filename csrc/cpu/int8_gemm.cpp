// kernel: int8_gemm
//
// y = ((q @ weight^T) · scale + residual @ weight[:, outliers]^T) · weight_scale + bias
//
// Both operands are contiguous along K, so a tile is kTileM × kTileN dot products and nothing is
// packed: kTileN weight rows stay in L1 while all rows of q (in L2) stream past them. The weight
// columns of the outliers are picked from those same rows.
#include <algorithm>
#include <bit>
#include <cstring>

#include "cpu/element.h"
#include "cpu/int8_kernels.h"
#include "cpu/int8_tile.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

static_assert(kTileN == 4);
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef float Panel __attribute__((vector_size(kPanelRows * sizeof(float)), may_alias));

// Up to kTileN columns of y: what the epilogue needs of each, and the outliers' share of every row.
struct ColumnTile {
  int64_t begin;
  int count;
  const int8_t* rows[kTileN];  // of weight; past the end the last one again
  Float4 scale;
  Float4 bias;
  Panel outliers[kMaxGemmRows / kPanelRows][kTileN];
};

void begin_column_tile(const Int8GemmJob& job, int64_t begin, int64_t end, ColumnTile& tile) {
  tile.begin = begin;
  tile.count = static_cast<int>(std::min<int64_t>(kTileN, end - begin));
  for (int j = 0; j < kTileN; ++j) {
    const int64_t n = std::min(begin + j, end - 1);
    tile.rows[j] = job.weight + n * job.k;
    tile.scale[j] = job.weight_scale[n * job.weight_scale_stride];
    tile.bias[j] = job.bias.data ? load_element(job.bias.data, job.bias.dtype, n) : 0.0f;
  }
}

// Adds `count` outlier columns to the sums of one panel of rows: residual[j] holds the 16 rows,
// weight[j] the tile's columns. With few rows most of the panel is padding, and the registers run
// along the columns instead. Either way the sum over j is one running sum for each (m, n), so that
// a row's bits depend neither on other rows nor on how many there are.
void add_panel(const Panel* residual, const Float4* weight, int64_t count, int64_t rows,
               Panel (&sums)[kTileN]) {
  constexpr int64_t kFewRows = 4;
  if (rows <= kFewRows) {
    for (int64_t i = 0; i < rows; ++i) {
      Float4 sum{sums[0][i], sums[1][i], sums[2][i], sums[3][i]};
      for (int64_t j = 0; j < count; ++j) sum += residual[j][i] * weight[j];
      for (int n = 0; n < kTileN; ++n) sums[n][i] = sum[n];
    }
    return;
  }
  Panel sum[kTileN] = {sums[0], sums[1], sums[2], sums[3]};
  for (int64_t j = 0; j < count; ++j) {
    for (int n = 0; n < kTileN; ++n) sum[n] += residual[j] * weight[j][n];
  }
  for (int n = 0; n < kTileN; ++n) sums[n] = sum[n];
}

// outliers[m][n] = Σ_j residual[m, j] · weight[n, columns[j]]
void add_outliers(const Int8GemmJob& job, int64_t m_begin, int64_t m_end, ColumnTile& tile) {
  constexpr int64_t kChunk = 256;
  Float4 weight[kChunk];
  const int64_t panels = (m_end - m_begin + kPanelRows - 1) / kPanelRows;
  const Panel* residual =
      reinterpret_cast<const Panel*>(job.residual) + m_begin / kPanelRows * job.outlier_count;
  for (int64_t p = 0; p < panels; ++p) {
    for (int n = 0; n < kTileN; ++n) tile.outliers[p][n] = Panel{};
  }
  for (int64_t begin = 0; begin < job.outlier_count; begin += kChunk) {
    const int64_t count = std::min(kChunk, job.outlier_count - begin);
    for (int64_t j = 0; j < count; ++j) {
      const int32_t column = job.outlier_columns[begin + j];
      const Int4 picked{tile.rows[0][column], tile.rows[1][column], tile.rows[2][column],
                        tile.rows[3][column]};
      weight[j] = __builtin_convertvector(picked, Float4);
    }
    for (int64_t p = 0; p < panels; ++p) {
      add_panel(residual + p * job.outlier_count + begin, weight, count,
                m_end - m_begin - p * kPanelRows, tile.outliers[p]);
    }
  }
}

template <int kRows>
void last_rows(const Int8GemmJob& job, int64_t row, int64_t count, const ColumnTile& tile,
               const Prefetch& prefetch, int32_t (*sums)[kTileN]) {
  if constexpr (kRows > 0) {
    if (count == kRows) {
      dot_tile<kRows>(job.q, job.prepared, row, job.k, tile.rows, prefetch, sums);
    } else {
      last_rows<kRows - 1>(job, row, count, tile, prefetch, sums);
    }
  }
}

// The products of the tile's weight rows with rows [m_begin, m_end) of q.
void dot_rows(const Int8GemmJob& job, int64_t m_begin, int64_t m_end, const ColumnTile& tile,
              int32_t (*sums)[kTileN]) {
  // The next kTileN weight rows are fetched in 2^shift equal parts by the first 2^shift row tiles.
  // Where nothing is left to fetch, the present rows are named: they are in cache already.
  const int64_t row_tiles = (m_end - m_begin + kTileM - 1) / kTileM;
  const int shift = std::bit_width(static_cast<uint64_t>(row_tiles)) - 1;
  const bool last = tile.begin + 2 * kTileN > job.n;
  const int8_t* const end = tile.rows[0] + 2 * kTileN * job.k;
  Prefetch prefetch{tile.rows[0] + (last ? 0 : kTileN * job.k), last ? 0 : job.k >> shift, shift};
  int64_t m = m_begin;
  for (; m + kTileM <= m_end; m += kTileM, sums += kTileM) {
    dot_tile<kTileM>(job.q, job.prepared, m, job.k, tile.rows, prefetch, sums);
    prefetch.first += kPrefetchStreams * prefetch.stride;
    if (prefetch.first + kPrefetchStreams * prefetch.stride > end) {
      prefetch = {tile.rows[0], 0, shift};
    }
  }
  last_rows<kTileM - 1>(job, m, m_end - m, tile, prefetch, sums);
}

// y = (sum · scale + outliers) · weight_scale + bias. All that the loop reads is copied to locals:
// the compiler must assume that storing y changes whatever memory it can reach.
template <DType kDtype>
void store_rows(const Int8GemmJob& job, int64_t m_begin, int64_t m_end, const ColumnTile& tile,
                const int32_t (*sums)[kTileN]) {
  const int64_t rows = m_end - m_begin, stride = job.y_stride, scale_stride = job.scale_stride;
  const float* scale = job.scale + m_begin * scale_stride;
  const bool outliers = job.outlier_count > 0;
  const int count = tile.count;
  const Float4 weight_scale = tile.scale, bias = tile.bias;
  void* const y = job.y;
  int64_t at = m_begin * stride + tile.begin;
  for (int64_t i = 0; i < rows; ++i, at += stride) {
    Int4 sum;
    std::memcpy(&sum, sums[i], sizeof(sum));
    Float4 value = __builtin_convertvector(sum, Float4) * scale[i * scale_stride];
    if (outliers) {
      for (int j = 0; j < kTileN; ++j) {
        value[j] += tile.outliers[i / kPanelRows][j][i % kPanelRows];
      }
    }
    store_four(y, kDtype, at, count, value * weight_scale + bias);
  }
}

void gemm(const Int8GemmJob& job, int64_t m_begin, int64_t m_end, int64_t n_begin, int64_t n_end) {
  const auto store = job.y_dtype == DType::kFloat32   ? store_rows<DType::kFloat32>
                     : job.y_dtype == DType::kFloat16 ? store_rows<DType::kFloat16>
                                                      : store_rows<DType::kBFloat16>;
  ColumnTile tile;
  int32_t sums[kMaxGemmRows][kTileN];
  for (int64_t n = n_begin; n < n_end; n += kTileN) {
    begin_column_tile(job, n, n_end, tile);
    dot_rows(job, m_begin, m_end, tile, sums);
    // After the dot products: the weight rows are in cache now.
    if (job.outlier_count) add_outliers(job, m_begin, m_end, tile);
    store(job, m_begin, m_end, tile, sums);
  }
}

void prepare_rows(const Int8GemmJob& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) prepare_row(job.q, job.k, row, job.prepared);
}

}  // namespace

const Int8GemmKernels int8_gemm_kernels = {prepared_row_bytes, streamed_row_bytes, prepare_rows,
                                           gemm};

}  // namespace pumice::cpu::PUMICE_ISA
