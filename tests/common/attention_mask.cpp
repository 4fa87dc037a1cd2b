// csrc/common/attention_mask.h against its definition, over random masks, element by element:
//
//     visible      is the definition
//     keys_of      leaves out no block that holds a visible element, queries_of neither; and
//     without
//                  bits and lists they name few that hold none
//     next_*       leave out, in addition, only blocks of which bits shows nothing
//     sees_all     is never wrong where it says so, and says so inside a plain window
//     summary      is what the squares of 64 show
//
// and all of these where the bits are those of a tree of queries, behind other keys.
//
// Prints what does not hold.
#include "common/attention_mask.h"

#include <cstdio>
#include <random>
#include <vector>

using namespace pumice;

namespace {

int failures = 0;

std::mt19937 generator(1);

int draw(int below) { return static_cast<int>(generator() % static_cast<uint32_t>(below)); }

// A mask, its lists, and what it shows by the definition.
struct Case {
  int q_len, k_len;
  AttentionMask mask;
  std::vector<int32_t> index;
  std::vector<uint32_t> bits;
  std::vector<uint8_t> blocks;
  std::vector<uint8_t> shown;  // [q_len, k_len]

  bool is_listed(int position) const {
    for (int32_t listed : index) {
      if (listed == position) return true;
    }
    return false;
  }

  bool is_global(int position) const {
    return (position >= 0 && position < mask.global_tokens) || is_listed(position);
  }

  // Of a tree: key j is that of query j - first.
  bool bit(int i, int j) const {
    if (mask.bits == nullptr) return true;
    const int first = mask.bits_of_queries ? k_len - q_len : 0;
    if (j < first) return true;
    return (mask.bits[i * mask.bits_row_words + (j - first) / 32] >> ((j - first) % 32) & 1) != 0;
  }

  bool defined_visible(int i, int j) const {
    const int p = i + k_len - q_len;
    if (mask.causal && j > p) return false;
    if (!bit(i, j)) return false;
    const bool in_window =
        j <= p + mask.window_right && (j >= p - mask.window_left || j < mask.sink_tokens);
    return in_window || is_global(j) || is_global(p);
  }

  bool any(int m0, int m1, int n0, int n1) const {
    for (int i = m0; i < m1 && i < q_len; ++i) {
      for (int j = n0; j < n1 && j < k_len; ++j) {
        if (shown[i * k_len + j]) return true;
      }
    }
    return false;
  }

  bool all(int m0, int m1, int n0, int n1) const {
    if (m1 > q_len || n1 > k_len) return false;
    for (int i = m0; i < m1; ++i) {
      for (int j = n0; j < n1; ++j) {
        if (!shown[i * k_len + j]) return false;
      }
    }
    return true;
  }
};

void expect(bool holds, const char* what, const Case& c, int a, int b) {
  if (holds) return;
  if (++failures > 20) return;
  std::printf(
      "%s at %d, %d: q_len=%d k_len=%d causal=%d window=%d,%d sink_tokens=%d global_tokens=%d "
      "listed=%zu bits=%d\n",
      what, a, b, c.q_len, c.k_len, c.mask.causal, c.mask.window_left, c.mask.window_right,
      c.mask.sink_tokens, c.mask.global_tokens, c.index.size(), c.mask.bits != nullptr);
}

// Squares of 64 that show all, none or some; lengths so that several lie along each side.
void draw_bits(Case& c) {
  const int rows = (c.q_len + kMaskBlock - 1) / kMaskBlock;
  const int columns = (c.k_len + kMaskBlock - 1) / kMaskBlock;
  c.mask.bits_row_words = (c.k_len + 31) / 32;
  c.mask.block_columns = columns;
  c.bits.assign(c.q_len * c.mask.bits_row_words, 0);
  c.blocks.assign(rows * columns, 0);
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < columns; ++n) {
      const int kind = draw(3);
      bool any = false, all = true;
      for (int i = m * kMaskBlock; i < (m + 1) * kMaskBlock && i < c.q_len; ++i) {
        for (int j = n * kMaskBlock; j < (n + 1) * kMaskBlock && j < c.k_len; ++j) {
          const bool set = kind == 2 || (kind == 1 && draw(4) == 0);
          any |= set;
          all &= set;
          if (set) c.bits[i * c.mask.bits_row_words + j / 32] |= 1u << (j % 32);
        }
      }
      c.blocks[m * columns + n] = all ? kMaskAll : any ? kMaskSome : kMaskNone;
    }
  }
  c.mask.bits = c.bits.data();
  c.mask.blocks = c.blocks.data();
}

// A row of bits for each of some queries of other sequences, then for each of this one.
void draw_tree(Case& c, int query_row) {
  c.mask.bits_row_words = (c.q_len + 31) / 32 + draw(2);
  c.bits.assign((query_row + c.q_len) * c.mask.bits_row_words, 0);
  for (uint32_t& word : c.bits) word = generator() | generator();
  c.mask.bits_of_queries = true;
}

void draw_case(Case& c, bool with_bits, bool tree, int query_row) {
  const int longest = with_bits || tree ? 200 : 60;
  c.q_len = draw(longest) + 1;
  c.k_len = draw(longest) + 1;
  c.mask = AttentionMask{};
  c.mask.causal = draw(2);
  if (draw(2)) c.mask.window_left = draw(longest / 4);
  if (draw(2)) c.mask.window_right = draw(longest / 4);
  if (draw(3) == 0) c.mask.sink_tokens = draw(10);
  if (draw(3) == 0) c.mask.global_tokens = draw(8);
  c.index.clear();
  if (draw(3) == 0) {
    int position = 0;
    for (int i = draw(5); i >= 0; --i) c.index.push_back(position += draw(longest / 3));
    for (int i = draw(3); i > 0; --i) c.index.push_back(1 << 30);  // no position: padding
    c.mask.global_index = c.index.data();
    c.mask.global_count = static_cast<int32_t>(c.index.size());
  }
  if (with_bits) draw_bits(c);
  if (tree) {
    draw_tree(c, query_row);
    c.mask.bits = c.bits.data() + query_row * c.mask.bits_row_words;
  }
  c.shown.resize(c.q_len * c.k_len);
  for (int i = 0; i < c.q_len; ++i) {
    for (int j = 0; j < c.k_len; ++j) c.shown[i * c.k_len + j] = c.defined_visible(i, j);
  }
}

// How many blocks were named that hold nothing, of how many in all, without bits.
struct Needless {
  int64_t named = 0, blocks = 0;
};

void check_keys(const Case& c, const MaskView& view, int rows, int block, Needless& needless) {
  for (int m0 = 0; m0 < c.q_len; m0 += rows) {
    const int m1 = smaller(c.q_len, m0 + rows);
    const BlockWalk walk = view.keys_of(m0, m1, block);
    const int end = walk.block_end(), blocks = (c.k_len + block - 1) / block;
    expect(end <= blocks, "a walk over keys ends with them", c, m0, end);
    int next = view.next_keys(walk, m0, m1, 0);
    for (int n = 0; n < blocks; ++n) {
      const int n0 = n * block, n1 = smaller(c.k_len, n0 + block);
      const bool named = n == next && n < end;
      const bool any = c.any(m0, m1, n0, n1);
      expect(named || !any, "a block of keys with a visible element is named", c, m0, n0);
      if (named) {
        next = view.next_keys(walk, m0, m1, n + 1);
        expect(next > n, "a walk goes on", c, m0, n0);
      }
      if (c.mask.bits == nullptr) {
        needless.named += named && !any;
        ++needless.blocks;
      } else if (named) {
        expect(view.summary(m0, m1, n0, n1) != kMaskNone, "bits show something of it", c, m0, n0);
      }
      expect(!view.sees_all(m0, m1, n0, n0 + block) || c.all(m0, m1, n0, n0 + block),
             "sees_all is true", c, m0, n0);
      if (c.mask.bits == nullptr && c.index.empty() && c.mask.global_tokens == 0 &&
          c.mask.sink_tokens == 0) {
        expect(view.sees_all(m0, m1, n0, n1) == c.all(m0, m1, n0, n1),
               "sees_all knows a plain window", c, m0, n0);
      }
    }
    expect(next == end, "a walk over keys ends", c, m0, next);
  }
}

void check_queries(const Case& c, const MaskView& view, int keys, int block, Needless& needless) {
  for (int n0 = 0; n0 < c.k_len; n0 += keys) {
    const int n1 = smaller(c.k_len, n0 + keys);
    const BlockWalk walk = view.queries_of(n0, n1, block);
    const int end = walk.block_end(), blocks = (c.q_len + block - 1) / block;
    expect(end <= blocks, "a walk over queries ends with them", c, n0, end);
    int next = view.next_queries(walk, n0, n1, 0);
    for (int m = 0; m < blocks; ++m) {
      const int m0 = m * block, m1 = smaller(c.q_len, m0 + block);
      const bool named = m == next && m < end;
      const bool any = c.any(m0, m1, n0, n1);
      expect(named || !any, "a block of queries with a visible element is named", c, m0, n0);
      if (named) {
        next = view.next_queries(walk, n0, n1, m + 1);
        expect(next > m, "a walk goes on", c, m0, n0);
      }
      if (c.mask.bits == nullptr) {
        needless.named += named && !any;
        ++needless.blocks;
      } else if (named) {
        expect(view.summary(m0, m1, n0, n1) != kMaskNone, "bits show something of it", c, m0, n0);
      }
    }
    expect(next == end, "a walk over queries ends", c, n0, next);
  }
}

void check_summary(const Case& c, const MaskView& view) {
  for (int t = 0; t < 20; ++t) {
    const int m0 = draw(c.q_len), m1 = m0 + 1 + draw(c.q_len - m0);
    const int n0 = draw(c.k_len), n1 = n0 + 1 + draw(c.k_len - n0);
    bool any = false, all = true;
    for (int i = m0; i < m1; ++i) {
      for (int j = n0; j < n1; ++j) {
        any |= c.bit(i, j);
        all &= c.bit(i, j);
      }
    }
    const MaskBlock said = view.summary(m0, m1, n0, n1);
    expect(said != kMaskNone || !any, "summary: none", c, m0, n0);
    expect(said != kMaskAll || all, "summary: all", c, m0, n0);
  }
}

}  // namespace

int main() {
  Needless keys, queries;
  Case c;
  for (int t = 0; t < 12000; ++t) {
    const bool with_bits = t % 12 == 0, tree = t % 12 == 1;
    const int query_row = draw(5);
    draw_case(c, with_bits, tree, query_row);
    AttentionMask mask = c.mask;  // whose bits begin at the first sequence
    if (tree) mask.bits = c.bits.data();
    const MaskView view = mask_view(mask, 0, 0, c.q_len, c.k_len, tree ? query_row : 0);
    for (int i = 0; i < c.q_len; ++i) {
      for (int j = 0; j < c.k_len; ++j) {
        expect(view.visible(i, j) == (c.shown[i * c.k_len + j] != 0), "visible", c, i, j);
      }
    }
    const int block = with_bits || tree ? 1 << (3 + draw(5)) : 1 + draw(9);
    const int other = with_bits || tree ? 1 << (3 + draw(5)) : 1 + draw(9);
    check_keys(c, view, other, block, keys);
    check_queries(c, view, other, block, queries);
    if (with_bits || tree) check_summary(c, view);
  }
  // Keys: not one. Queries: those before the first key, where there are global tokens.
  if (keys.named > 0 || queries.named * 20 > queries.blocks) {
    ++failures;
    std::printf("needless blocks: %ld of %ld of keys, %ld of %ld of queries\n", long(keys.named),
                long(keys.blocks), long(queries.named), long(queries.blocks));
  }
  std::printf("%d failures; needless %.2f %% and %.2f %%\n", failures,
              100.0 * keys.named / keys.blocks, 100.0 * queries.named / queries.blocks);
  return failures != 0;
}
