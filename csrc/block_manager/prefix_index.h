// Which full blocks hold which prefixes: a trie of blocks, found by hash.
//
// A node is a full block. It stands for the whole prefix that ends with it: its parent's prefix,
// then its own tokens. Its hash chains the parent's hash, the tokens and, at the root, the extra
// key (an adapter, a tenant), so that one probe a block finds the longest known prefix.
//
// A hash is only a hint. A probe compares extra key, parent and tokens themselves, and since a node
// never outlives its parent, equality of one block gives, by induction, equality of the prefix:
// colliding hashes cost time, never a wrong hit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pumice::kv {

constexpr int32_t kNoBlock = -1;

class PrefixIndex {
 public:
  // tokens[b · block_size …) are those whose keys and values block b holds; the owner writes them.
  // Fewer than 64 hash bits serve to test collisions.
  PrefixIndex(int32_t blocks, int32_t block_size, int hash_bits);

  // The block that continues `parent` (kNoBlock: starts a sequence) with these block_size tokens.
  int32_t find(int32_t parent, int64_t extra_key, const int32_t* tokens) const;

  // Makes block, whose tokens are written and which is not held yet, a child of parent.
  void insert(int32_t block, int32_t parent, int64_t extra_key);

  // Takes block and all that continue it out, children before parents; tells `dropped` each.
  template <typename Dropped>
  void erase_subtree(int32_t root, Dropped dropped) {
    int32_t block = root;
    while (true) {
      while (nodes_[block].first_child != kNoBlock) block = nodes_[block].first_child;
      const int32_t parent = nodes_[block].parent;
      erase_leaf(block);
      dropped(block);
      if (block == root) return;
      block = parent;
    }
  }

  bool holds(int32_t block) const { return nodes_[block].serial != 0; }
  int32_t parent(int32_t block) const { return nodes_[block].parent; }
  int32_t size() const { return size_; }

  // Another number for every insertion: tells whether a block still is the node it once was.
  uint64_t serial(int32_t block) const { return nodes_[block].serial; }

  int32_t* tokens(int32_t block) {
    return tokens_.data() + static_cast<int64_t>(block) * block_size_;
  }
  const int32_t* tokens(int32_t block) const {
    return tokens_.data() + static_cast<int64_t>(block) * block_size_;
  }

 private:
  struct Node {
    uint64_t hash = 0;
    uint64_t serial = 0;  // 0: not held
    int64_t extra_key = 0;
    int32_t parent = kNoBlock, first_child = kNoBlock;
    int32_t next_sibling = kNoBlock, previous_sibling = kNoBlock;
    int32_t next_in_bucket = kNoBlock;
  };

  uint64_t hash(int32_t parent, int64_t extra_key, const int32_t* tokens) const;
  void erase_leaf(int32_t block);

  int32_t block_size_;
  int32_t size_ = 0;
  uint64_t hash_mask_;
  uint64_t last_serial_ = 0;
  std::vector<Node> nodes_;
  std::vector<int32_t> buckets_;  // a power of two
  std::vector<int32_t> tokens_;
};

}  // namespace pumice::kv
