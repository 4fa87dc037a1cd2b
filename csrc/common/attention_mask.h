// Which keys a query sees: one description of every mask, for the kernels of all devices, forward
// and backward.
//
// Query i of a sequence of q_len queries and k_len keys stands at position p = i + k_len - q_len
// among the keys (the last query at the last key: "bottom-right"). It sees key j if
//
//     j ≤ p                                                       (with causal), and
//     j < bits_first, or bit j - bits_first of its row in `bits` is set     (with bits), and
//     j ≤ p + window_right and (j ≥ p - window_left or j < sink_tokens),
//         or j is global, or p is global.
//
// Global positions (Longformer) are 0 … global_tokens - 1 and those listed in global_index. A sink
// token (StreamingLLM) is seen from beyond the left edge of the window, never from before itself.
// Bits may be of the queries alone, which are then the last keys: a tree of drafted tokens, each of
// which sees its ancestors and all that came before the tree.
//
// A kernel asks three questions. Which blocks of keys may a tile of queries see, next(); is such a
// block wholly visible, sees_all(); if not, is this element visible, visible(). So the cost of a
// mask is that of the area it leaves, and of the element test at its edges.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace pumice {

// A side of the window without a bound. Sequences are shorter, so that sums do not overflow.
constexpr int32_t kUnboundedWindow = int32_t{1} << 29;
constexpr int64_t kMaxSequence = kUnboundedWindow - 1;

// mask_blocks says of each square of so many queries and keys whether bits shows all, some or none.
constexpr int32_t kMaskBlock = 64;
enum MaskBlock : uint8_t { kMaskNone = 0, kMaskSome = 1, kMaskAll = 2 };

// The mask of a call.
struct AttentionMask {
  bool causal = false;
  int32_t window_left = kUnboundedWindow;
  int32_t window_right = kUnboundedWindow;
  int32_t sink_tokens = 0;
  int32_t global_tokens = 0;
  int32_t global_count = 0;
  const int32_t* global_index = nullptr;                // [B, global_count], each row ascending
  int64_t global_batch_stride = 0;                      // 0: one list for all
  const uint32_t* bits = nullptr;                       // [B, H, q_len, bits_row_words], or null
  const uint8_t* blocks = nullptr;                      // [B, H, blocks of q_len, block_columns]
  int64_t bits_batch_stride = 0, bits_head_stride = 0;  // in words; 0: one mask for all
  int64_t blocks_batch_stride = 0, blocks_head_stride = 0;
  int32_t bits_row_words = 0, block_columns = 0;
  // Bit t of a row is the key of query t, not key t; rows follow each other in the order of the
  // queries of all sequences, [total, bits_row_words], and blocks is null.
  bool bits_of_queries = false;
};

PUMICE_HOST_DEVICE int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
PUMICE_HOST_DEVICE int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

// The first of an ascending list that is not below value; count if none.
PUMICE_HOST_DEVICE int32_t first_not_below(const int32_t* list, int32_t count, int32_t value) {
  int32_t low = 0;
  while (low < count) {
    const int32_t middle = low + (count - low) / 2;
    if (list[middle] < value) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return low;
}

// The blocks along one side of the score matrix that may hold a visible element: those that touch
// [begin, prefix_end), [low, high) or a listed index.
struct BlockWalk {
  int32_t begin = 0, end = 0;  // nothing outside is visible
  int32_t prefix_end = 0;
  int32_t low = 0, high = 0;
  const int32_t* index = nullptr;  // index[i] - shift
  int32_t count = 0, shift = 0;
  int32_t block = 1;

  PUMICE_HOST_DEVICE_MEMBER int32_t block_end() const {
    return end <= begin ? 0 : (end + block - 1) / block;
  }

  // The first such block not before block n; block_end() if there is none.
  PUMICE_HOST_DEVICE_MEMBER int32_t next(int32_t n) const {
    const int32_t last = block_end();
    if (n >= last) return last;
    const int32_t from = larger(n * block, begin);
    if (from < prefix_end || (from >= low && from < high)) return from / block;
    int32_t found = from < low && low < high ? low : end;
    if (count > 0) {
      const int32_t i = first_not_below(index, count, from + shift);
      if (i < count) found = smaller(found, index[i] - shift);
    }
    return found < end ? found / block : last;
  }
};

// The mask as one head of one sequence has it.
struct MaskView {
  bool causal;
  int32_t window_left, window_right, sink_tokens, global_tokens, global_count;
  const int32_t* global_index;
  const uint32_t* bits;
  const uint8_t* blocks;  // null: nothing is known of squares that reach past bits_first
  int32_t bits_row_words, block_columns;
  int32_t bits_first;  // the key of bit 0
  int32_t q_len, k_len;

  PUMICE_HOST_DEVICE_MEMBER int32_t position(int32_t i) const { return i + k_len - q_len; }

  PUMICE_HOST_DEVICE_MEMBER bool windowed() const {
    return window_left < kUnboundedWindow || window_right < kUnboundedWindow;
  }

  PUMICE_HOST_DEVICE_MEMBER bool is_global(int32_t position) const {
    if (position < 0) return false;
    if (position < global_tokens) return true;
    if (global_count == 0) return false;
    const int32_t i = first_not_below(global_index, global_count, position);
    return i < global_count && global_index[i] == position;
  }

  // Whether a position in [begin, end) is global.
  PUMICE_HOST_DEVICE_MEMBER bool any_global(int32_t begin, int32_t end) const {
    begin = larger(begin, 0);
    if (begin >= end) return false;
    if (begin < global_tokens) return true;
    if (global_count == 0) return false;
    const int32_t i = first_not_below(global_index, global_count, begin);
    return i < global_count && global_index[i] < end;
  }

  // i and j in range; what lies outside is no key.
  PUMICE_HOST_DEVICE_MEMBER bool visible(int32_t i, int32_t j) const {
    const int32_t p = position(i);
    if (causal && j > p) return false;
    if (bits != nullptr && j >= bits_first) {
      const int32_t bit = j - bits_first;
      const uint32_t word = bits[static_cast<int64_t>(i) * bits_row_words + bit / 32];
      if ((word >> (bit % 32) & 1u) == 0) return false;
    }
    if (j <= p + window_right && (j >= p - window_left || j < sink_tokens)) return true;
    return windowed() && (is_global(j) || is_global(p));
  }

  // What the squares of `blocks` that queries [m0, m1) and keys [n0, n1) touch say of them.
  PUMICE_HOST_DEVICE_MEMBER MaskBlock summary(int32_t m0, int32_t m1, int32_t n0,
                                              int32_t n1) const {
    if (bits == nullptr || n1 <= bits_first) return kMaskAll;
    if (blocks == nullptr) return kMaskSome;
    bool any = false, all = true;
    for (int32_t m = m0 / kMaskBlock; m * kMaskBlock < m1; ++m) {
      for (int32_t n = n0 / kMaskBlock; n * kMaskBlock < n1; ++n) {
        const uint8_t block = blocks[static_cast<int64_t>(m) * block_columns + n];
        any |= block != kMaskNone;
        all &= block == kMaskAll;
      }
    }
    return all ? kMaskAll : any ? kMaskSome : kMaskNone;
  }

  // Whether queries [m0, m1) all see the keys [n0, n1), as far as can be told from the edges. The
  // ranges are not empty; one that passes the sequence's end is not all visible.
  PUMICE_HOST_DEVICE_MEMBER bool sees_all(int32_t m0, int32_t m1, int32_t n0, int32_t n1) const {
    if (n1 > k_len || m1 > q_len) return false;
    const int32_t first = position(m0), last = position(m1 - 1);
    if (causal && n1 - 1 > first) return false;
    const bool in_window =
        n1 - 1 <= first + window_right && (n0 >= last - window_left || n1 <= sink_tokens);
    if (!in_window && n1 > global_tokens && !(first >= 0 && last < global_tokens)) return false;
    return summary(m0, m1, n0, n1) == kMaskAll;
  }

  // The blocks of `block` keys that queries [m0, m1), not empty and m1 ≤ q_len, may see.
  PUMICE_HOST_DEVICE_MEMBER BlockWalk keys_of(int32_t m0, int32_t m1, int32_t block) const {
    const int32_t first = position(m0), last = position(m1 - 1);
    BlockWalk walk;
    walk.block = block;
    walk.end = causal ? smaller(k_len, last + 1) : k_len;
    walk.low = larger(0, first - window_left);
    walk.high = smaller(walk.end, last + window_right + 1);
    walk.prefix_end =
        smaller(walk.end, larger(global_tokens, smaller(sink_tokens, last + window_right + 1)));
    if (windowed() && any_global(first, last + 1)) walk.prefix_end = walk.end;
    walk.index = global_index;
    walk.count = windowed() ? global_count : 0;
    return walk;
  }

  // The blocks of `block` queries that may see one of the keys [n0, n1), not empty and n1 ≤ k_len.
  PUMICE_HOST_DEVICE_MEMBER BlockWalk queries_of(int32_t n0, int32_t n1, int32_t block) const {
    const int32_t shift = k_len - q_len;  // row i stands at position i + shift
    BlockWalk walk;
    walk.block = block;
    walk.begin = causal ? larger(0, n0 - shift) : 0;
    walk.end = q_len;
    walk.low = larger(walk.begin, n0 - window_right - shift);
    walk.high = n0 < sink_tokens ? q_len : smaller(q_len, n1 + window_left - shift);
    walk.prefix_end = windowed() && any_global(n0, n1)
                          ? q_len
                          : smaller(q_len, windowed() ? global_tokens - shift : 0);
    walk.index = global_index;
    walk.count = windowed() ? global_count : 0;
    walk.shift = shift;
    return walk;
  }

  // walk.next(n) for a walk over keys, past the blocks of which `bits` shows nothing.
  PUMICE_HOST_DEVICE_MEMBER int32_t next_keys(const BlockWalk& walk, int32_t m0, int32_t m1,
                                              int32_t n) const {
    n = walk.next(n);
    if (bits == nullptr) return n;
    const int32_t end = walk.block_end();
    while (n < end &&
           summary(m0, m1, n * walk.block, smaller((n + 1) * walk.block, k_len)) == kMaskNone) {
      n = walk.next(n + 1);
    }
    return n;
  }

  // The same for a walk over queries.
  PUMICE_HOST_DEVICE_MEMBER int32_t next_queries(const BlockWalk& walk, int32_t n0, int32_t n1,
                                                 int32_t m) const {
    m = walk.next(m);
    if (bits == nullptr) return m;
    const int32_t end = walk.block_end();
    while (m < end &&
           summary(m * walk.block, smaller((m + 1) * walk.block, q_len), n0, n1) == kMaskNone) {
      m = walk.next(m + 1);
    }
    return m;
  }
};

// query_row: of the sequence's first query among those of all, for bits_of_queries.
PUMICE_HOST_DEVICE MaskView mask_view(const AttentionMask& mask, int64_t batch, int64_t head,
                                      int32_t q_len, int32_t k_len, int64_t query_row = 0) {
  MaskView view;
  view.causal = mask.causal;
  view.window_left = mask.window_left;
  view.window_right = mask.window_right;
  view.sink_tokens = mask.sink_tokens;
  view.global_tokens = mask.global_tokens;
  view.global_count = mask.global_count;
  view.global_index = mask.global_index + batch * mask.global_batch_stride;
  view.bits = mask.bits;
  view.blocks = mask.blocks;
  view.bits_first = 0;
  if (mask.bits_of_queries) {
    view.bits += query_row * mask.bits_row_words;
    view.bits_first = k_len - q_len;
  } else if (mask.bits != nullptr) {
    view.bits += batch * mask.bits_batch_stride + head * mask.bits_head_stride;
    view.blocks += batch * mask.blocks_batch_stride + head * mask.blocks_head_stride;
  }
  view.bits_row_words = mask.bits_row_words;
  view.block_columns = mask.block_columns;
  view.q_len = q_len;
  view.k_len = k_len;
  return view;
}

}  // namespace pumice
