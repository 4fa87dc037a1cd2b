// Sequences come and go: allocate, fork, truncate, free. Growth is in append.cpp.
#include "block_manager/block_manager.h"

#include <algorithm>
#include <limits>

#include "block_manager/errors.h"

namespace pumice::kv {
namespace {

using Lock = std::lock_guard<std::mutex>;

const Options& checked(const Options& o) {
  constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();
  require(o.num_blocks >= 1 && o.num_blocks < kMaxBlocks,
          "BlockManager: num_blocks must be in [1, 2^31 - 1), not ", o.num_blocks);
  require(o.block_size >= 1 && o.block_size <= kMaxTokens,
          "BlockManager: block_size must be in [1, 2^29), not ", o.block_size);
  require(o.watermark >= 0 && o.watermark < 1, "BlockManager: watermark must be in [0, 1), not ",
          o.watermark);
  require(o.window_left >= -1 && o.window_left <= kMaxTokens,
          "BlockManager: window_left must be in [0, 2^29), or None for no window, not ",
          o.window_left);
  require(o.sink_tokens >= 0 && o.sink_tokens <= kMaxTokens,
          "BlockManager: sink_tokens must be in [0, 2^29), not ", o.sink_tokens);
  require(o.null_block >= -1 && o.null_block < o.num_blocks,
          "BlockManager: null_block must be -1, or a block of the ", o.num_blocks, ", not ",
          o.null_block);
  require(o.null_block < 0 || o.num_blocks >= 2,
          "BlockManager: num_blocks must be at least 2 where null_block reserves one");
  require(o.hash_bits >= 0 && o.hash_bits <= 64, "BlockManager: hash_bits must be in [0, 64], not ",
          o.hash_bits);
  return o;
}

}  // namespace

BlockManager::BlockManager(const Options& options)
    : options_(checked(options)),
      block_size_(static_cast<int32_t>(options.block_size)),
      null_block_(static_cast<int32_t>(options.null_block)),
      watermark_blocks_(static_cast<int64_t>(options.watermark * options.num_blocks)),
      sink_blocks_(blocks_of(options.sink_tokens)),
      pool_(static_cast<int32_t>(options.num_blocks), block_size_, null_block_,
            static_cast<int>(options.hash_bits)) {}

Sequence& BlockManager::find(const char* operation, int64_t id) {
  const auto found = sequences_.find(id);
  if (found != sequences_.end()) return found->second;
  if (id >= 0 && id < next_id_) {
    throw UnknownSequence(message(operation, ": sequence ", id, " was freed"));
  }
  throw UnknownSequence(message(operation, ": there is no sequence ", id));
}

std::vector<Sequence*> BlockManager::find_all(const char* operation, Ids ids) {
  std::vector<Sequence*> sequences;
  sequences.reserve(ids.size());
  ++calls_;
  for (int64_t id : ids) {
    Sequence& sequence = find(operation, id);
    require(sequence.seen_by != calls_, operation, ": sequence ", id, " is named twice");
    sequence.seen_by = calls_;
    sequences.push_back(&sequence);
  }
  return sequences;
}

int32_t BlockManager::live_begin(int64_t query) const {
  if (options_.window_left < 0) return 0;
  return static_cast<int32_t>(std::max<int64_t>(0, query - options_.window_left) / block_size_);
}

std::vector<int32_t> BlockManager::match(std::span<const int32_t> tokens, int64_t extra_key) const {
  std::vector<int32_t> hits;
  if (!options_.prefix_caching || tokens.empty()) return hits;
  // At least one token is left to compute, for without a query there is no next token.
  const size_t most = (tokens.size() - 1) / block_size_;
  int32_t parent = kNoBlock;
  while (hits.size() < most) {
    parent = pool_.index().find(parent, extra_key, tokens.data() + hits.size() * block_size_);
    if (parent == kNoBlock) break;
    hits.push_back(parent);
  }
  return hits;
}

BlockManager::Admission BlockManager::admit(const char* operation, const Prompt& prompt) const {
  const int64_t tokens =
      prompt.tokens ? static_cast<int64_t>(prompt.tokens->size()) : prompt.num_tokens;
  require(tokens >= 0, operation, ": num_tokens must not be negative, not ", tokens);
  require(tokens <= kMaxTokens, operation, ": a sequence must be shorter than 2^29 tokens, not ",
          tokens);
  require(prompt.limit >= 0, operation, ": limit must not be negative, not ", prompt.limit);
  Admission admission;
  if (prompt.tokens) admission.hits = match(*prompt.tokens, prompt.extra_key);
  const auto hits = static_cast<int64_t>(admission.hits.size());
  admission.cached_tokens = hits * block_size_;
  admission.new_tokens = std::min(tokens - admission.cached_tokens, prompt.limit);
  admission.live_begin = live_begin(admission.cached_tokens);
  admission.needed = blocks_of(admission.cached_tokens + admission.new_tokens) - hits;
  for (int64_t i = 0; i < hits; ++i) {
    const bool live = i < sink_blocks_ || i >= admission.live_begin;
    if (live && pool_.is_cached(admission.hits[i])) ++admission.needed;
  }
  return admission;
}

Allocation BlockManager::allocate(const Prompt& prompt) {
  Lock lock(mutex_);
  const Admission admission = admit("allocate", prompt);
  if (admission.needed + watermark_blocks_ > pool_.available()) {
    throw OutOfBlocks(
        message("allocate: ", admission.cached_tokens + admission.new_tokens, " tokens (",
                admission.cached_tokens, " of them cached) need ", admission.needed,
                " blocks beside the watermark of ", watermark_blocks_, "; ", pool_.available(),
                " of ", usable_blocks(), " are available"),
        admission.needed + watermark_blocks_, pool_.available());
  }
  Allocation allocation;
  allocation.slot_mapping.reserve(admission.new_tokens);
  allocation.id = next_id_++;
  allocation.cached_tokens = admission.cached_tokens;
  Sequence& sequence = sequences_[allocation.id];
  sequence.extra_key = prompt.extra_key;
  sequence.tokens_known = prompt.tokens.has_value();
  sequence.prefix.lost = !sequence.tokens_known || !options_.prefix_caching;
  sequence.reclaimed_end = sink_blocks_;
  for (int32_t block : admission.hits) pool_.share(block);
  sequence.table = admission.hits;
  sequence.tokens = sequence.committed = static_cast<int32_t>(admission.cached_tokens);
  sequence.indexed = static_cast<int32_t>(admission.hits.size());
  if (!admission.hits.empty()) {
    sequence.prefix = PrefixNode::of(pool_.index(), admission.hits.back());
  }
  reclaim(sequence);
  grow(sequence, admission.new_tokens,
       prompt.tokens ? prompt.tokens->data() + admission.cached_tokens : nullptr);
  append_slots(sequence, static_cast<int32_t>(admission.cached_tokens), allocation.slot_mapping);
  allocation.num_tokens = sequence.tokens;
  prompt_tokens_ += prompt.tokens ? static_cast<int64_t>(prompt.tokens->size()) : prompt.num_tokens;
  prompt_hits_ += admission.cached_tokens;
  return allocation;
}

bool BlockManager::can_allocate(const Prompt& prompt) {
  Lock lock(mutex_);
  return admit("can_allocate", prompt).needed + watermark_blocks_ <= pool_.available();
}

int64_t BlockManager::match_prefix(std::span<const int32_t> tokens, int64_t extra_key) {
  Lock lock(mutex_);
  return static_cast<int64_t>(match(tokens, extra_key).size()) * block_size_;
}

std::vector<int64_t> BlockManager::fork(Ids parents) {
  Lock lock(mutex_);
  for (int64_t parent : parents) find("fork", parent);
  std::vector<int64_t> children;
  for (int64_t parent : parents) {
    Sequence child = find("fork", parent);
    for (int32_t block : child.table) {
      if (block != null_block_) pool_.share(block);
    }
    children.push_back(next_id_);
    sequences_.emplace(next_id_++, std::move(child));
  }
  return children;
}

void BlockManager::free(Ids ids) {
  Lock lock(mutex_);
  ++calls_;
  for (int64_t id : ids) {
    if (!sequences_.contains(id) && id >= 0 && id < next_id_) {
      throw DoubleFree(message("free: sequence ", id, " was freed before"));
    }
    Sequence& sequence = find("free", id);
    if (sequence.seen_by == calls_) {
      throw DoubleFree(message("free: sequence ", id, " is named twice"));
    }
    sequence.seen_by = calls_;
  }
  for (int64_t id : ids) {
    const auto node = sequences_.extract(id);
    // From the end: what continues a prefix is to be evicted before it.
    const std::vector<int32_t>& table = node.mapped().table;
    for (auto block = table.rbegin(); block != table.rend(); ++block) {
      if (*block != null_block_) pool_.release(*block);
    }
  }
}

void BlockManager::truncate(Ids ids, std::span<const int64_t> lengths) {
  Lock lock(mutex_);
  const std::vector<Sequence*> sequences = find_all("truncate", ids);
  require(lengths.size() == ids.size(), "truncate: ", ids.size(), " ids, but ", lengths.size(),
          " lengths");
  for (size_t i = 0; i < ids.size(); ++i) {
    const Sequence& sequence = *sequences[i];
    require(lengths[i] >= 0 && lengths[i] <= sequence.tokens, "truncate: sequence ", ids[i], " of ",
            sequence.tokens, " tokens cannot be cut to ", lengths[i]);
    // The next query stands at lengths[i] and must find all that its window shows.
    const int32_t first_needed = std::max(sink_blocks_, live_begin(lengths[i]));
    require(std::min(sequence.reclaimed_end, blocks_of(lengths[i])) <= first_needed,
            "truncate: sequence ", ids[i], " cannot be cut to ", lengths[i],
            " tokens: its blocks before token ", int64_t{sequence.reclaimed_end} * block_size_,
            " left the window and were reclaimed");
  }
  PrefixIndex& index = pool_.index();
  for (size_t i = 0; i < ids.size(); ++i) {
    Sequence& sequence = *sequences[i];
    sequence.tokens = static_cast<int32_t>(lengths[i]);
    sequence.committed = std::min(sequence.committed, sequence.tokens);
    const auto blocks = static_cast<size_t>(blocks_of(lengths[i]));
    while (sequence.table.size() > blocks) {
      if (sequence.table.back() != null_block_) pool_.release(sequence.table.back());
      sequence.table.pop_back();
    }
    sequence.reclaimed_end =
        std::max(sink_blocks_, std::min(sequence.reclaimed_end, static_cast<int32_t>(blocks)));
    const bool valid = sequence.prefix.valid(index);
    int32_t node = sequence.prefix.block;
    for (; sequence.indexed > sequence.tokens / block_size_; --sequence.indexed) {
      if (valid) node = index.parent(node);
    }
    if (valid) sequence.prefix = PrefixNode::of(index, node);
    const bool may_be_known = sequence.tokens_known && options_.prefix_caching;
    if (sequence.indexed == 0 && may_be_known) sequence.prefix = {};
  }
}

void BlockManager::clear_cache() {
  Lock lock(mutex_);
  pool_.forget_all();
}

Stats BlockManager::stats() {
  Lock lock(mutex_);
  Stats stats;
  stats.num_blocks = usable_blocks();
  stats.free = pool_.free_count();
  stats.cached = pool_.cached_count();
  stats.used = stats.num_blocks - pool_.available();
  stats.shared = pool_.shared_count();
  stats.indexed = pool_.index().size();
  stats.sequences = static_cast<int64_t>(sequences_.size());
  // A block that several sequences share holds as much as the longest of them put there. Only a
  // sequence's last block may be partly filled, and only a shared one needs the comparison.
  std::unordered_map<int32_t, int32_t> partial;
  for (const auto& [id, sequence] : sequences_) {
    stats.tokens += sequence.tokens;
    const int32_t filled = sequence.tokens % block_size_;
    if (filled == 0) continue;
    int32_t& most = partial[sequence.table.back()];
    most = std::max(most, filled);
  }
  bool any_shared = false;
  for (const auto& [block, filled] : partial) any_shared |= pool_.references(block) > 1;
  if (any_shared) {
    for (const auto& [id, sequence] : sequences_) {
      for (int32_t i = 0; i < sequence.tokens / block_size_; ++i) {
        partial.erase(sequence.table[i]);  // the whole of it is someone's
      }
    }
  }
  for (const auto& [block, filled] : partial) stats.waste += block_size_ - filled;
  stats.stored_tokens = stats.used * block_size_ - stats.waste;
  stats.evictions = pool_.evictions();
  stats.prompt_tokens = prompt_tokens_;
  stats.prompt_hits = prompt_hits_;
  return stats;
}

int64_t BlockManager::available_blocks() {
  Lock lock(mutex_);
  return pool_.available();
}

std::vector<int32_t> BlockManager::block_table(int64_t id) {
  Lock lock(mutex_);
  return find("block_table", id).table;
}

int64_t BlockManager::num_tokens(int64_t id) {
  Lock lock(mutex_);
  return find("num_tokens", id).tokens;
}

int32_t BlockManager::check_block(const char* operation, int64_t block) const {
  require(block >= 0 && block < options_.num_blocks, operation, ": block must be in [0, ",
          options_.num_blocks, "), not ", block);
  return static_cast<int32_t>(block);
}

int64_t BlockManager::references(int64_t block) {
  Lock lock(mutex_);
  return pool_.references(check_block("ref_count", block));
}

std::vector<int32_t> BlockManager::block_tokens(int64_t block) {
  Lock lock(mutex_);
  const int32_t* tokens = pool_.index().tokens(check_block("block_tokens", block));
  return {tokens, tokens + block_size_};
}

}  // namespace pumice::kv
