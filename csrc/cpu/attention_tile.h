// The operands of a task of attention in cache, and their two products. Three kinds:
//
//   kFloats   everything as float, the keys transposed
//   kPairs    bfloat16 in pairs of neighbours, for its own instruction; probabilities are rounded
//   kRows     for a few rows: keys and values are read once, where they lie and as they are stored
//
// Which one depends on the sequence's own lengths, the dtype and the processor only.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/attention_dots.h"
#include "cpu/attention_forward.h"
#include "cpu/attention_pairs.h"
#include "cpu/attention_visible.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

enum class Kind { kFloats, kPairs, kRows };

// Up to so many rows keys and values are read once for every kDotRows, from memory that others wait
// for; to convert and transpose a block, and then to multiply, takes longer.
constexpr int32_t kFewRows = 8;

// A sum of many terms one after another would round worse than the blocked ones of other libraries.
constexpr int64_t kSumLength = 128;

inline int64_t pairs_of(int64_t n) { return (n + 1) / 2; }

// Of the sums over D: floats, or pairs.
template <Kind kKind>
int64_t length_of(const AttentionProblem& problem) {
  return kKind == Kind::kPairs ? pairs_of(problem.head_dim) : problem.head_dim;
}

// Tokens of one head of one sequence.
struct HeadRows {
  const void* data;
  DType dtype;
  int64_t begin, stride, columns;  // in elements

  HeadRows(const TokenView& view, DType type, int64_t offset, int64_t head, int64_t dim)
      : data(view.data),
        dtype(type),
        begin(offset + head * view.head_stride),
        stride(view.token_stride),
        columns(dim) {}
  int64_t at(int64_t token) const { return begin + token * stride; }
  const char* address(int64_t token) const {
    return static_cast<const char*>(data) + at(token) * size_of(dtype);
  }
  void locate(int64_t token, int64_t count, const void** rows) const {
    const char* row = address(token);
    for (int64_t t = 0; t < count; ++t, row += stride * size_of(dtype)) rows[t] = row;
  }
};

// Rows are those of the task's first head, then of the next, …
struct Tile {
  BlockRows<float> query;   // [rows, D]
  BlockRows<float> scores;  // [rows, kBlockKeys], then the probabilities
  BlockRows<float> sums;    // [rows, D_v]
  float* weights;           // [rows, kLanes]: the sums of probabilities
  float* reference;         // [rows]
  uint64_t* visible;        // [queries], of the block at hand
  float* key_memory;        // [D, kBlockKeys] or [kBlockKeys, D]
  float* value_memory;      // [kBlockKeys, D_v]
  float* scratch;           // [kBlockPad, max(D, D_v)]
  float* key_pages;         // [kBlockKeys, D] and
  float* value_pages;       // [kBlockKeys, D_v], brought together, of a paged cache
  // Where the block at hand is, there or in the task's packed keys,
  BlockRows<const float> key, value;
  // or, of a few rows, vector by vector, there or in place, and what to fetch for later.
  const void** key_rows;    // [kBlockKeys]
  const void** value_rows;  // [kBlockKeys]
  const void** next_keys;   // [kBlockKeys], with room for as many more
  const void** next_values;
  float* nothing;  // [max(D, D_v)], 0: what is not seen
  CacheType stored = CacheType::kQuery;
  DType stored_dtype = DType::kFloat32;
  bool key_pairs = false;  // of a few rows too, q·k of bfloat16 as pairs

  // With no memory, only the size in floats is of interest.
  static int64_t lay_out(const AttentionProblem& problem, float* memory, Tile& tile) {
    const int64_t query_stride = padded_columns(problem.head_dim);
    const int64_t value_stride = padded_columns(problem.value_dim);
    int64_t size = 0;
    const auto piece = [&](int64_t count) {
      float* at = memory == nullptr ? nullptr : memory + size;
      size += padded_columns(count);
      return at;
    };
    tile.query = {piece(kTaskRows * query_stride), query_stride};
    tile.scores = {piece(kTaskRows * kBlockKeys), kBlockKeys};
    tile.sums = {piece(kTaskRows * value_stride), value_stride};
    tile.weights = piece(kTaskRows * kLanes);
    tile.reference = piece(kTaskRows);
    tile.visible = reinterpret_cast<uint64_t*>(piece(2 * kTaskRows));
    tile.key_memory = piece(kBlockKeys * query_stride);
    tile.value_memory = piece(kBlockKeys * value_stride);
    tile.scratch = piece(kBlockPad * std::max(query_stride, value_stride));
    const bool paged = problem.seq_lens != nullptr;
    tile.key_pages = piece(paged ? kBlockKeys * query_stride : 0);
    tile.value_pages = piece(paged ? kBlockKeys * value_stride : 0);
    tile.key_rows = reinterpret_cast<const void**>(piece(2 * kBlockKeys));
    tile.value_rows = reinterpret_cast<const void**>(piece(2 * kBlockKeys));
    tile.next_keys = reinterpret_cast<const void**>(piece(4 * kBlockKeys));
    tile.next_values = reinterpret_cast<const void**>(piece(4 * kBlockKeys));
    tile.nothing = piece(std::max(query_stride, value_stride));
    return size;
  }

  // A block of keys and values that lies in memory as load_keys() and load_values() leave it,
  // those behind these.
  template <Kind kKind>
  static int64_t packed_size(const AttentionProblem& problem) {
    const int64_t rows = kKind == Kind::kPairs ? kBlockKeys / 2 : kBlockKeys;
    return length_of<kKind>(problem) * kBlockKeys + rows * padded_columns(problem.value_dim);
  }
  void use_packed(const float* block) {
    key = {block, kBlockKeys};
    value = {block + length * kBlockKeys, sums.stride};
  }

  // Queries m0, … of one head, from `row` on.
  template <Kind kKind>
  void load_queries(const HeadRows& x, int32_t m0, int32_t count, int32_t row) {
    if (kKind == Kind::kPairs || key_pairs) {
      query.stride = padded_columns(pairs_of(x.columns));
      load_pairs(x.data, x.at(m0), x.stride, count, x.columns, {query.row(row), query.stride});
    } else {
      load_block(x.data, x.dtype, x.at(m0), x.stride, count, x.columns,
                 {query.row(row), query.stride});
    }
  }

  template <Kind kKind>
  void load_keys(const HeadRows& x, int32_t n0, int32_t count) {
    const BlockRows<float> transposed{key_memory, kBlockKeys};
    key = {key_memory, kBlockKeys};
    if constexpr (kKind == Kind::kPairs) {
      load_transposed_pairs(x.data, x.at(n0), x.stride, count, x.columns, scratch, transposed);
    } else if constexpr (kKind == Kind::kFloats) {
      load_transposed(x.data, x.dtype, x.at(n0), x.stride, count, x.columns, scratch, transposed);
    } else {
      load_rows(x, n0, count, {key_memory, padded_columns(x.columns)}, key_rows);
    }
  }

  template <Kind kKind>
  void load_values(const HeadRows& x, int32_t n0, int32_t count) {
    const BlockRows<float> rows{value_memory, sums.stride};
    value = {value_memory, sums.stride};
    if constexpr (kKind == Kind::kPairs) {
      load_row_pairs(x.data, x.at(n0), x.stride, count, x.columns, rows);
    } else if constexpr (kKind == Kind::kFloats) {
      load_block(x.data, x.dtype, x.at(n0), x.stride, count, x.columns, rows);
    } else {
      load_rows(x, n0, count, rows, value_rows);
    }
  }

  static void load_rows(const HeadRows& x, int32_t n0, int32_t count, BlockRows<float> out,
                        const void** rows) {
    load_block(x.data, x.dtype, x.at(n0), x.stride, count, x.columns, out);
    for (int32_t t = 0; t < count; ++t) rows[t] = out.row(t);
  }

  template <Kind kKind>
  bool values_are_finite(int32_t count) const {
    if constexpr (kKind == Kind::kPairs) {
      return pairs_are_finite(value.data, pairs_of(count) * value.stride);
    } else if constexpr (kKind == Kind::kRows) {
      bool finite = true;
      with_stored(stored, stored_dtype, [&](auto type) {
        finite =
            rows_are_finite(RowTable<decltype(type)>{value_rows, value_rows}, count, sums.stride);
      });
      return finite;
    } else {
      const void* rows[kBlockKeys];
      for (int32_t t = 0; t < count; ++t) rows[t] = value.row(t);
      return rows_are_finite(RowTable<StoredFloat32>{rows, rows}, count, sums.stride);
    }
  }

  // scores[row …, left … right) = q·k, left and right multiples of kBlockPad. `count` keys exist.
  template <Kind kKind>
  void multiply_keys(int32_t row, int32_t rows, int left, int right, int32_t count) const {
    const BlockRows<float> products{scores.row(row) + left, kBlockKeys};
    if constexpr (kKind == Kind::kRows) {
      const BlockRows<const float> q{query.row(row), query.stride};
      const int keys = std::min(right, count) - left;
      if (key_pairs) {
        const RowTable<StoredPairs> k{key_rows + left, next_keys + left};
        multiply_rows<StoredPairs, Pairs>(q, k, products, rows, keys, query.stride);
        return;
      }
      with_stored(stored, stored_dtype, [&](auto type) {
        const RowTable<decltype(type)> k{key_rows + left, next_keys + left};
        multiply_rows(q, k, products, rows, keys, query.stride);
      });
    } else {
      using Lanes = std::conditional_t<kKind == Kind::kPairs, Pairs, Floats>;
      for (int64_t d = 0; d < length; d += kSumLength) {
        const LeftOperand q{query.row(row) + d, query.stride};
        const BlockRows<const float> k{key.row(d) + left, kBlockKeys};
        const int64_t terms = std::min(kSumLength, length - d);
        if (d == 0) {
          multiply_block<false, Lanes>(q, k, products, rows, right - left, terms);
        } else {
          multiply_block<true, Lanes>(q, k, products, rows, right - left, terms);
        }
      }
    }
  }

  // sums[row …] += p·v over the keys [first, last), outside of which p is 0 up to the next
  // multiples of kBlockPad.
  template <Kind kKind>
  void multiply_values(int32_t row, int32_t rows, int first, int last) const {
    LeftOperand p{scores.row(row), kBlockKeys};
    const BlockRows<float> out{sums.row(row), sums.stride};
    if constexpr (kKind == Kind::kPairs) {
      for (int32_t r = row; r < row + rows; ++r) pair_row(scores.row(r), kBlockKeys);
      first /= 2;
      last = (last + 1) / 2;
      p.data += first;
      multiply_block<true, Pairs>(p, {value.row(first), value.stride}, out, rows, sums.stride,
                                  last - first);
    } else if constexpr (kKind == Kind::kRows) {
      p.data += first;
      with_stored(stored, stored_dtype, [&](auto type) {
        const RowTable<decltype(type)> v{value_rows + first, next_values + first};
        add_products(p, v, out, rows, sums.stride, last - first);
      });
    } else {
      p.data += first;
      multiply_block<true>(p, {value.row(first), value.stride}, out, rows, sums.stride,
                           last - first);
    }
  }

  // sums[row] += p[j] · v[j], key by key: for values that must not meet the p = 0 of a row that
  // does not see them.
  template <Kind kKind>
  void multiply_value(int32_t row, int j, const HeadRows* x, int32_t n0) const {
    if constexpr (kKind == Kind::kRows) {
      multiply_values<kKind>(row, 1, j, j + 1);
    } else {
      BlockRows<const float> one{value.row(j), value.stride};
      if constexpr (kKind == Kind::kPairs) {
        load_block(x->data, x->dtype, x->at(n0 + j), x->stride, 1, x->columns,
                   {scratch, sums.stride});
        one = {scratch, sums.stride};
      }
      multiply_block<true>({scores.row(row) + j, kBlockKeys}, one, {sums.row(row), sums.stride}, 1,
                           sums.stride, 1);
    }
  }

  int64_t length = 0;  // see length_of()
};

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
