// The blocks themselves: who refers to them, which are free, which are kept for their contents.
//
// A block is in one of three states:
//   used     some sequence refers to it
//   cached   none does, but the prefix index still finds its contents
//   free     neither
// take() prefers free blocks, and then the cached one that was released longest ago. Releasing a
// block also renews its unreferenced ancestors, for who used it used the prefix before it: so no
// block is taken before those that continue it and are unreferenced themselves.
#pragma once

#include <cstdint>
#include <vector>

#include "block_manager/lru_list.h"
#include "block_manager/prefix_index.h"

namespace pumice::kv {

class BlockPool {
 public:
  // reserved: a block that is never handed out, or kNoBlock.
  BlockPool(int32_t blocks, int32_t block_size, int32_t reserved, int hash_bits);

  PrefixIndex& index() { return index_; }
  const PrefixIndex& index() const { return index_; }

  int32_t references(int32_t block) const { return references_[block]; }
  int32_t free_count() const { return static_cast<int32_t>(free_.size()); }
  int32_t cached_count() const { return lru_.size(); }
  int32_t available() const { return free_count() + cached_count(); }
  int32_t shared_count() const { return shared_; }
  int64_t evictions() const { return evictions_; }
  bool is_cached(int32_t block) const { return lru_.contains(block); }

  // A block with one reference and no contents. There must be one available().
  int32_t take();

  // One more reference to a block that is used or cached.
  void share(int32_t block);

  // One reference less.
  void release(int32_t block);

  // The block's contents, and all prefixes through it, can no longer be found.
  void forget(int32_t block);
  void forget_all();

  // What if block were released: whether that would leave it unreferenced. Until end_trial() only
  // references() sees it.
  bool try_release(int32_t block) {
    tried_.push_back(block);
    return --references_[block] == 0;
  }
  void end_trial() {
    for (int32_t block : tried_) ++references_[block];
    tried_.clear();
  }

 private:
  std::vector<int32_t> references_;
  std::vector<int32_t> free_;  // a stack: the block used last is the warmest in the caches
  std::vector<int32_t> tried_;
  int32_t shared_ = 0;  // blocks with two references or more
  int64_t evictions_ = 0;
  LruList lru_;
  PrefixIndex index_;
};

}  // namespace pumice::kv
