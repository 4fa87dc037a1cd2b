#include "block_manager/block_pool.h"

namespace pumice::kv {

BlockPool::BlockPool(int32_t blocks, int32_t block_size, int32_t reserved, int hash_bits)
    : references_(blocks), lru_(blocks), index_(blocks, block_size, hash_bits) {
  free_.reserve(blocks);
  for (int32_t block = blocks; block-- > 0;) {
    if (block != reserved) free_.push_back(block);
  }
}

int32_t BlockPool::take() {
  if (free_.empty()) {
    const int32_t before = cached_count();
    forget(lru_.oldest());
    evictions_ += before - cached_count();
  }
  const int32_t block = free_.back();
  free_.pop_back();
  references_[block] = 1;
  return block;
}

void BlockPool::share(int32_t block) {
  const int32_t references = ++references_[block];
  if (references == 1) lru_.remove(block);
  if (references == 2) ++shared_;
}

void BlockPool::release(int32_t block) {
  const int32_t references = --references_[block];
  if (references == 1) --shared_;
  if (references > 0) return;
  if (!index_.holds(block)) {
    free_.push_back(block);
    return;
  }
  lru_.push_youngest(block);
  int32_t ancestor = index_.parent(block);
  for (; ancestor != kNoBlock && lru_.contains(ancestor); ancestor = index_.parent(ancestor)) {
    lru_.remove(ancestor);
    lru_.push_youngest(ancestor);
  }
}

void BlockPool::forget(int32_t block) {
  index_.erase_subtree(block, [this](int32_t dropped) {
    if (!lru_.contains(dropped)) return;  // a sequence still uses it
    lru_.remove(dropped);
    free_.push_back(dropped);
  });
}

void BlockPool::forget_all() {
  for (int32_t block = 0; block < static_cast<int32_t>(references_.size()); ++block) {
    if (index_.holds(block)) forget(block);
  }
}

}  // namespace pumice::kv
