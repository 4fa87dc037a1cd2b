// The paged KV cache's bookkeeping (PagedAttention, Kwon et al. 2023): which block of the cache
// holds which tokens of which sequence.
//
// It owns no memory of the cache, only numbers: its answers (block tables, slots, copy orders) are
// arguments of the kernels. Every operation happens wholly or, throwing, not at all; all are safe
// to call from several threads. The semantics are told in python/pumice/decode/block_manager.py.
#pragma once

#include <cstdint>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "block_manager/block_pool.h"
#include "block_manager/sequence.h"

namespace pumice::kv {

// A sequence must stay shorter, as the attention operators' are.
constexpr int64_t kMaxTokens = (int64_t{1} << 29) - 1;

struct Options {
  int64_t num_blocks = 0, block_size = 0;
  bool prefix_caching = true;
  double watermark = 0.01;   // of the blocks, kept free of new sequences
  int64_t window_left = -1;  // a query at p sees keys ≥ p - window_left; -1: all
  int64_t sink_tokens = 0;   // … and those before sink_tokens
  int64_t null_block = -1;   // what a table holds where there is no block
  int64_t hash_bits = 64;
};

// The first tokens of a sequence.
struct Prompt {
  std::optional<std::span<const int32_t>> tokens;  // absent: unknown, never shared by content
  int64_t num_tokens = 0;
  int64_t extra_key = 0;
  int64_t limit = kMaxTokens;  // store no more than so many beyond the cached ones
};

struct Allocation {
  int64_t id = 0, num_tokens = 0, cached_tokens = 0;
  std::vector<int64_t> slot_mapping;  // of tokens [cached_tokens, num_tokens)
};

// What the kernels need for one forward pass over n sequences.
struct Step {
  std::vector<int64_t> slot_mapping;  // of the new tokens, sequence after sequence
  std::vector<int32_t> block_table;   // [n, width]
  std::vector<int32_t> seq_lens;      // [n]
  std::vector<int64_t> copies;        // [m, 2]: blocks to copy (from, to) before writing
  int64_t width = 0;
};

struct Stats {
  int64_t num_blocks = 0;  // without the reserved one
  int64_t free = 0, cached = 0, used = 0, shared = 0;
  int64_t indexed = 0;  // blocks the prefix index finds, used or cached
  int64_t sequences = 0;
  int64_t tokens = 0;         // the sequences' lengths, added up
  int64_t stored_tokens = 0;  // slots of used blocks that hold a token, shared ones counted once
  int64_t waste = 0;          // slots of used blocks that hold none
  int64_t evictions = 0, prompt_tokens = 0, prompt_hits = 0;  // since construction
};

class BlockManager {
 public:
  using Ids = std::span<const int64_t>;
  using Counts = std::optional<std::span<const int64_t>>;  // absent: one for each id
  using Tokens = std::optional<std::span<const int32_t>>;

  explicit BlockManager(const Options& options);

  Allocation allocate(const Prompt& prompt);
  bool can_allocate(const Prompt& prompt);
  int64_t match_prefix(std::span<const int32_t> tokens, int64_t extra_key);

  std::vector<int64_t> fork(Ids parents);
  void free(Ids ids);

  // width < 0: that of the longest row.
  Step append(Ids ids, Counts counts, Tokens tokens, int64_t width);
  bool can_append(Ids ids, Counts counts);
  Step view(Ids ids, Counts counts, int64_t width);

  void commit(Ids ids, Counts lengths);
  void truncate(Ids ids, std::span<const int64_t> lengths);
  void clear_cache();

  Stats stats();
  const Options& options() const { return options_; }
  int64_t watermark_blocks() const { return watermark_blocks_; }
  int64_t usable_blocks() const { return options_.num_blocks - (options_.null_block >= 0); }
  int64_t available_blocks();

  std::vector<int32_t> block_table(int64_t id);
  int64_t num_tokens(int64_t id);
  int64_t references(int64_t block);
  std::vector<int32_t> block_tokens(int64_t block);

 private:
  struct Admission {
    std::vector<int32_t> hits;  // blocks of the cached prefix
    int64_t cached_tokens = 0, new_tokens = 0, live_begin = 0;
    int64_t needed = 0;  // blocks that would no longer be available
  };
  struct Growth {
    int64_t needed = 0, available = 0;
  };

  Sequence& find(const char* operation, int64_t id);
  std::vector<Sequence*> find_all(const char* operation, Ids ids);
  int32_t check_block(const char* operation, int64_t block) const;
  int32_t blocks_of(int64_t tokens) const {
    return static_cast<int32_t>((tokens + block_size_ - 1) / block_size_);
  }

  // Blocks [sink_blocks_, live_begin(p)) are seen by no query at position p or later.
  int32_t live_begin(int64_t query) const;

  std::vector<int32_t> match(std::span<const int32_t> tokens, int64_t extra_key) const;
  Admission admit(const char* operation, const Prompt& prompt) const;
  Growth plan_growth(std::span<Sequence* const> sequences, Counts counts);
  void check_growth(std::span<Sequence* const> sequences, Ids ids, Counts counts,
                    const char* operation) const;
  void reclaim(Sequence& sequence);
  void make_last_writable(Sequence& sequence, std::vector<int64_t>& copies);
  void grow(Sequence& sequence, int64_t count, const int32_t* tokens);
  void append_slots(const Sequence& sequence, int32_t begin, std::vector<int64_t>& slots) const;
  void prepare_tables(const char* operation, Ids ids, int64_t width, Step& step) const;
  void fill_tables(std::span<Sequence* const> sequences, Step& step) const;
  void index_committed(Sequence& sequence);

  const Options options_;
  const int32_t block_size_;
  const int32_t null_block_;
  const int64_t watermark_blocks_;
  const int32_t sink_blocks_;

  std::mutex mutex_;  // over all below
  BlockPool pool_;
  std::unordered_map<int64_t, Sequence> sequences_;
  int64_t next_id_ = 0;
  uint64_t calls_ = 0;
  int64_t prompt_tokens_ = 0, prompt_hits_ = 0;
};

}  // namespace pumice::kv
