// Sequences grow: what a decode step, a chunk of a prompt or a draft of several tokens asks for.
//
// A call first gives back what the window left, then takes what it needs. Whether that will do is
// counted beforehand on the reference counts themselves, so that a refusal changes nothing.
#include <algorithm>

#include "block_manager/block_manager.h"
#include "block_manager/errors.h"

namespace pumice::kv {
namespace {

using Lock = std::lock_guard<std::mutex>;

int64_t count_of(const BlockManager::Counts& counts, size_t i) { return counts ? (*counts)[i] : 1; }

void check_counts(const char* operation, const BlockManager::Counts& counts, const char* name,
                  BlockManager::Ids ids) {
  if (!counts) return;
  require(counts->size() == ids.size(), operation, ": ", ids.size(), " ids, but ", counts->size(),
          " ", name);
  for (size_t i = 0; i < ids.size(); ++i) {
    require((*counts)[i] >= 0, operation, ": ", name, " must not be negative, not ", (*counts)[i],
            " for sequence ", ids[i]);
  }
}

}  // namespace

void BlockManager::check_growth(std::span<Sequence* const> sequences, Ids ids, Counts counts,
                                const char* operation) const {
  check_counts(operation, counts, "counts", ids);
  for (size_t i = 0; i < ids.size(); ++i) {
    require(count_of(counts, i) <= kMaxTokens - sequences[i]->tokens, operation, ": sequence ",
            ids[i], " of ", sequences[i]->tokens,
            " tokens must stay shorter than 2^29, not grow by ", count_of(counts, i));
  }
}

BlockManager::Growth BlockManager::plan_growth(std::span<Sequence* const> sequences,
                                               Counts counts) {
  Growth growth{0, pool_.available()};
  if (options_.window_left >= 0) {
    for (size_t i = 0; i < sequences.size(); ++i) {
      const Sequence& sequence = *sequences[i];
      if (count_of(counts, i) == 0) continue;
      for (int32_t b = sequence.reclaimed_end; b < live_begin(sequence.tokens); ++b) {
        growth.available += pool_.try_release(sequence.table[b]);
      }
    }
  }
  for (size_t i = 0; i < sequences.size(); ++i) {
    const Sequence& sequence = *sequences[i];
    const int64_t count = count_of(counts, i);
    const int32_t filled = sequence.tokens % block_size_;
    if (count == 0) continue;
    if (filled > 0 && pool_.references(sequence.table.back()) > 1) {
      pool_.try_release(sequence.table.back());
      ++growth.needed;
    }
    if (filled == 0 || filled + count > block_size_) {
      growth.needed +=
          blocks_of(sequence.tokens + count) - static_cast<int64_t>(sequence.table.size());
    }
  }
  pool_.end_trial();
  return growth;
}

void BlockManager::reclaim(Sequence& sequence) {
  const int32_t end = live_begin(sequence.tokens);
  if (end <= sequence.reclaimed_end) return;
  for (int32_t b = end; b-- > sequence.reclaimed_end;) {
    pool_.release(sequence.table[b]);
    sequence.table[b] = null_block_;
  }
  sequence.reclaimed_end = end;
}

// A block that others refer to is copied; one that the index finds is taken out of it.
void BlockManager::make_last_writable(Sequence& sequence, std::vector<int64_t>& copies) {
  int32_t& last = sequence.table.back();
  PrefixIndex& index = pool_.index();
  if (pool_.references(last) > 1) {
    const int32_t copy = pool_.take();
    std::copy_n(index.tokens(last), block_size_, index.tokens(copy));
    pool_.release(last);
    copies.insert(copies.end(), {last, copy});
    last = copy;
  } else if (index.holds(last)) {
    pool_.forget(last);
  }
}

void BlockManager::grow(Sequence& sequence, int64_t count, const int32_t* tokens) {
  const auto blocks = static_cast<size_t>(blocks_of(sequence.tokens + count));
  while (sequence.table.size() < blocks) sequence.table.push_back(pool_.take());
  const bool known = tokens != nullptr && sequence.tokens_known;
  for (int64_t done = 0; done < count;) {
    const int32_t offset = sequence.tokens % block_size_;
    const auto run =
        static_cast<int32_t>(std::min<int64_t>(count - done, int64_t{block_size_} - offset));
    int32_t* slots = pool_.index().tokens(sequence.table[sequence.tokens / block_size_]) + offset;
    if (known) {
      std::copy_n(tokens + done, run, slots);
    } else {
      std::fill_n(slots, run, -1);
    }
    sequence.tokens += run;
    done += run;
  }
}

void BlockManager::append_slots(const Sequence& sequence, int32_t begin,
                                std::vector<int64_t>& slots) const {
  for (int32_t token = begin; token < sequence.tokens;) {
    const int32_t b = token / block_size_;
    const int64_t end = std::min<int64_t>(sequence.tokens, (int64_t{b} + 1) * block_size_);
    int64_t slot = int64_t{sequence.table[b]} * block_size_ + token % block_size_;
    for (; token < end; ++token) slots.push_back(slot++);
  }
}

// Takes the memory of the tables, of at least step.width, before anything is changed.
void BlockManager::prepare_tables(const char* operation, Ids ids, int64_t width, Step& step) const {
  require(width < 0 || (width >= step.width && width <= kMaxTokens), operation,
          ": width must be at least ", step.width, " blocks and less than 2^29, not ", width);
  if (width >= 0) step.width = width;
  step.seq_lens.reserve(ids.size());
  step.block_table.reserve(ids.size() * step.width);
}

void BlockManager::fill_tables(std::span<Sequence* const> sequences, Step& step) const {
  for (const Sequence* sequence : sequences) {
    step.seq_lens.push_back(sequence->tokens);
    step.block_table.insert(step.block_table.end(), sequence->table.begin(), sequence->table.end());
    step.block_table.resize(step.seq_lens.size() * step.width, null_block_);
  }
}

Step BlockManager::append(Ids ids, Counts counts, Tokens tokens, int64_t width) {
  Lock lock(mutex_);
  const std::vector<Sequence*> sequences = find_all("append", ids);
  check_growth(sequences, ids, counts, "append");
  int64_t total = 0;
  Step step;
  for (size_t i = 0; i < ids.size(); ++i) {
    total += count_of(counts, i);
    step.width =
        std::max<int64_t>(step.width, blocks_of(sequences[i]->tokens + count_of(counts, i)));
  }
  if (tokens) {
    require(static_cast<int64_t>(tokens->size()) == total, "append: ", total,
            " tokens are to be appended, but ", tokens->size(), " came");
  } else if (options_.prefix_caching) {
    for (size_t i = 0; i < ids.size(); ++i) {
      require(!sequences[i]->tokens_known || count_of(counts, i) == 0,
              "append: tokens must be given, for prefix caching is on and sequence ", ids[i],
              " has known tokens");
    }
  }
  const Growth growth = plan_growth(sequences, counts);
  if (growth.needed > growth.available) {
    throw OutOfBlocks(
        message("append: ", total, " tokens to ", ids.size(), " sequences need ", growth.needed,
                " blocks; ", growth.available, " of ", usable_blocks(), " are available"),
        growth.needed, growth.available);
  }
  prepare_tables("append", ids, width, step);
  step.slot_mapping.reserve(total);

  if (options_.window_left >= 0) {
    for (size_t i = 0; i < ids.size(); ++i) {
      if (count_of(counts, i) > 0) reclaim(*sequences[i]);
    }
  }
  const int32_t* next = tokens ? tokens->data() : nullptr;
  for (size_t i = 0; i < ids.size(); ++i) {
    Sequence& sequence = *sequences[i];
    const int64_t count = count_of(counts, i);
    const int32_t begin = sequence.tokens;
    if (count == 0) continue;
    if (begin % block_size_ != 0) make_last_writable(sequence, step.copies);
    grow(sequence, count, next);
    append_slots(sequence, begin, step.slot_mapping);
    if (next != nullptr) next += count;
  }
  fill_tables(sequences, step);
  return step;
}

bool BlockManager::can_append(Ids ids, Counts counts) {
  Lock lock(mutex_);
  const std::vector<Sequence*> sequences = find_all("can_append", ids);
  check_growth(sequences, ids, counts, "can_append");
  const Growth growth = plan_growth(sequences, counts);
  return growth.needed <= growth.available;
}

Step BlockManager::view(Ids ids, Counts counts, int64_t width) {
  Lock lock(mutex_);
  const std::vector<Sequence*> sequences = find_all("view", ids);
  check_counts("view", counts, "counts", ids);
  Step step;
  for (size_t i = 0; i < ids.size(); ++i) {
    const Sequence& sequence = *sequences[i];
    const int64_t begin = sequence.tokens - count_of(counts, i);
    require(begin >= 0, "view: sequence ", ids[i], " has ", sequence.tokens, " tokens, not ",
            count_of(counts, i));
    for (int64_t b = begin / block_size_; b < blocks_of(sequence.tokens); ++b) {
      require(sequence.table[b] != null_block_, "view: token ", b * block_size_, " of sequence ",
              ids[i], " left the window and was reclaimed");
    }
    append_slots(sequence, static_cast<int32_t>(begin), step.slot_mapping);
    step.width = std::max<int64_t>(step.width, sequence.table.size());
  }
  prepare_tables("view", ids, width, step);
  fill_tables(sequences, step);
  return step;
}

void BlockManager::commit(Ids ids, Counts lengths) {
  Lock lock(mutex_);
  const std::vector<Sequence*> sequences = find_all("commit", ids);
  check_counts("commit", lengths, "lengths", ids);
  for (size_t i = 0; lengths && i < ids.size(); ++i) {
    require((*lengths)[i] <= sequences[i]->tokens, "commit: sequence ", ids[i], " has ",
            sequences[i]->tokens, " tokens, not ", (*lengths)[i]);
  }
  for (size_t i = 0; i < ids.size(); ++i) {
    Sequence& sequence = *sequences[i];
    const auto length = lengths ? static_cast<int32_t>((*lengths)[i]) : sequence.tokens;
    sequence.committed = std::max(sequence.committed, length);
    index_committed(sequence);
  }
}

void BlockManager::index_committed(Sequence& sequence) {
  PrefixIndex& index = pool_.index();
  for (; sequence.indexed < sequence.committed / block_size_; ++sequence.indexed) {
    PrefixNode& prefix = sequence.prefix;
    const int32_t block = sequence.table[sequence.indexed];
    if (prefix.lost || block == null_block_ || !prefix.valid(index)) {
      prefix.lost = true;
      continue;
    }
    // Another block may hold the same prefix already, computed at the same time; it stays the one
    // that is found, and the sequence keeps its own.
    int32_t node = index.find(prefix.block, sequence.extra_key, index.tokens(block));
    if (node == kNoBlock && !index.holds(block)) {
      index.insert(block, prefix.block, sequence.extra_key);
      node = block;
    }
    prefix = node == kNoBlock ? PrefixNode{.lost = true} : PrefixNode::of(index, node);
  }
}

}  // namespace pumice::kv
