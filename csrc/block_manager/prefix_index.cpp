#include "block_manager/prefix_index.h"

#include <algorithm>
#include <bit>

namespace pumice::kv {
namespace {

// The finalizer of SplitMix64: every bit of the input moves every bit of the result.
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace

PrefixIndex::PrefixIndex(int32_t blocks, int32_t block_size, int hash_bits)
    : block_size_(block_size),
      hash_mask_(hash_bits == 64 ? ~uint64_t{0} : (uint64_t{1} << hash_bits) - 1),
      nodes_(blocks),
      buckets_(std::bit_ceil(static_cast<size_t>(blocks)), kNoBlock),
      tokens_(static_cast<size_t>(blocks) * block_size) {}

uint64_t PrefixIndex::hash(int32_t parent, int64_t extra_key, const int32_t* tokens) const {
  uint64_t h = parent == kNoBlock ? mix(static_cast<uint64_t>(extra_key) + 1) : nodes_[parent].hash;
  for (int32_t i = 0; i < block_size_; ++i) {
    h = (h ^ static_cast<uint32_t>(tokens[i])) * 0x9e3779b97f4a7c15u;
    h ^= h >> 32;
  }
  return mix(h) & hash_mask_;
}

int32_t PrefixIndex::find(int32_t parent, int64_t extra_key, const int32_t* tokens) const {
  const uint64_t h = hash(parent, extra_key, tokens);
  int32_t block = buckets_[h & (buckets_.size() - 1)];
  for (; block != kNoBlock; block = nodes_[block].next_in_bucket) {
    const Node& node = nodes_[block];
    if (node.hash == h && node.parent == parent && node.extra_key == extra_key &&
        std::equal(tokens, tokens + block_size_, this->tokens(block))) {
      return block;
    }
  }
  return kNoBlock;
}

void PrefixIndex::insert(int32_t block, int32_t parent, int64_t extra_key) {
  Node& node = nodes_[block];
  node.hash = hash(parent, extra_key, tokens(block));
  node.serial = ++last_serial_;
  node.extra_key = extra_key;
  node.parent = parent;
  if (parent != kNoBlock) {
    const int32_t sibling = nodes_[parent].first_child;
    node.next_sibling = sibling;
    if (sibling != kNoBlock) nodes_[sibling].previous_sibling = block;
    nodes_[parent].first_child = block;
  }
  int32_t& bucket = buckets_[node.hash & (buckets_.size() - 1)];
  node.next_in_bucket = bucket;
  bucket = block;
  ++size_;
}

void PrefixIndex::erase_leaf(int32_t block) {
  Node& node = nodes_[block];
  if (node.next_sibling != kNoBlock) {
    nodes_[node.next_sibling].previous_sibling = node.previous_sibling;
  }
  if (node.previous_sibling != kNoBlock) {
    nodes_[node.previous_sibling].next_sibling = node.next_sibling;
  } else if (node.parent != kNoBlock) {
    nodes_[node.parent].first_child = node.next_sibling;
  }
  int32_t* link = &buckets_[node.hash & (buckets_.size() - 1)];
  while (*link != block) link = &nodes_[*link].next_in_bucket;
  *link = node.next_in_bucket;
  node = {};
  --size_;
}

}  // namespace pumice::kv
