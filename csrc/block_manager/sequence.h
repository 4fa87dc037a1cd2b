// What the block manager keeps of one sequence.
#pragma once

#include <cstdint>
#include <vector>

#include "block_manager/prefix_index.h"

namespace pumice::kv {

// A node of the prefix index as a sequence remembers it: by block and serial, for the block may
// have been evicted and used for something else since.
struct PrefixNode {
  int32_t block = kNoBlock;  // kNoBlock: the root, before any token
  uint64_t serial = 0;
  bool lost = false;  // the prefix is unknown to the index; so will be all that continues it

  bool valid(const PrefixIndex& index) const {
    return !lost && (block == kNoBlock || index.serial(block) == serial);
  }
  static PrefixNode of(const PrefixIndex& index, int32_t block) {
    return {block, block == kNoBlock ? 0 : index.serial(block), false};
  }
};

struct Sequence {
  std::vector<int32_t> table;  // block i holds tokens [i · block_size, (i + 1) · block_size)
  int32_t tokens = 0;
  int32_t committed = 0;      // of these tokens, keys and values are computed
  int32_t indexed = 0;        // so many leading blocks were offered to the prefix index
  int32_t reclaimed_end = 0;  // table[sink blocks … reclaimed_end) was given back
  PrefixNode prefix;          // of the indexed blocks
  int64_t extra_key = 0;
  bool tokens_known = true;
  uint64_t seen_by = 0;  // the last call that named this sequence: finds ids named twice
};

}  // namespace pumice::kv
