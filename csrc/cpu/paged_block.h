// Where a task's keys or values lie, one after the other or in the pages of a cache, a block of 64
// tokens at a time as attention_tile.h reads them. For a few rows each vector is read in place, as
// it is stored. For more a page is, where it holds the whole block; else they are brought together,
// stored bytes as the query's type (which holds every one of them exactly). Their scale is left to
// the score and the sum.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>

#include "cpu/attention_tile.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

// The vectors of one sequence.
class PagedRows {
 public:
  PagedRows(const PagedCache& cache, const CacheView& view, DType dtype, int64_t batch,
            int64_t columns)
      : cache_(cache),
        view_(view),
        table_(cache.block_table + batch * cache.max_blocks),
        dtype_(dtype),
        size_(cache.type == CacheType::kQuery ? size_of(dtype) : 1),
        columns_(columns) {}

  int64_t size() const { return size_; }  // of an element, in bytes
  int64_t head_stride() const { return view_.head_stride * size_; }

  // f(address) for tokens [begin, end) of a head, whatever of them will be seen.
  template <typename F>
  void for_tokens(int64_t head, int32_t begin, int32_t end, const F& f) const {
    for (int32_t token = begin; token < end;) {
      const int32_t slot = token % cache_.block_size;
      const int32_t run = std::min(end - token, cache_.block_size - slot);
      const int64_t block = table_[token / cache_.block_size];
      token += run;
      if (block < 0 || block >= cache_.num_blocks) continue;  // given back
      const char* at = address(view_.at(block, slot, head));
      for (int32_t r = 0; r < run; ++r) f(at + r * view_.slot_stride * size_);
    }
  }

  // The addresses of tokens [n0, n0 + count) of a head; of those not in `seen`, whose pages are
  // not looked up, that of `nothing`.
  void locate(int64_t head, int32_t n0, int32_t count, uint64_t seen, const void* nothing,
              const void** rows) const {
    int32_t page = n0 / cache_.block_size, slot = n0 % cache_.block_size;
    for (int32_t t = 0; t < count; ++page, slot = 0) {
      const int32_t run = std::min(count - t, cache_.block_size - slot);
      const uint64_t all = bit_range(0, run), read = seen >> t & all;
      std::fill_n(rows + t, run, nothing);
      if (read != 0) {
        const char* at = address(view_.at(table_[page], slot, head));
        const int64_t stride = view_.slot_stride * size_;
        if (read == all) {
          for (int32_t r = 0; r < run; ++r) rows[t + r] = at + r * stride;
        } else {
          for (uint64_t bits = read; bits != 0; bits &= bits - 1) {
            rows[t + std::countr_zero(bits)] = at + std::countr_zero(bits) * stride;
          }
        }
      }
      t += run;
    }
  }

  // Tokens [n0, n0 + count) of a head, of which those in `seen` are read, and no other page;
  // brought together in `memory`, [kBlockKeys, columns] floats, the unseen ones as 0.
  HeadRows block(int64_t head, int32_t n0, int32_t count, uint64_t seen, float* memory) const {
    const int32_t slot = n0 % cache_.block_size;
    const bool all_seen = (~seen & bit_range(0, count)) == 0;
    if (cache_.type == CacheType::kQuery && slot + count <= cache_.block_size && all_seen) {
      const int64_t at = view_.at(table_[n0 / cache_.block_size], slot, head);
      return rows(view_.data, at, view_.slot_stride, n0);
    }
    const void* from[kBlockKeys];
    locate(head, n0, count, seen, nullptr, from);
    for (int32_t t = 0; t < count; ++t) {
      char* row = reinterpret_cast<char*>(memory) + t * columns_ * size_of(dtype_);
      if (from[t] == nullptr) {
        std::memset(row, 0, static_cast<size_t>(columns_ * size_of(dtype_)));
      } else {
        copy(from[t], row);
      }
    }
    return rows(memory, 0, columns_, n0);
  }

 private:
  const char* address(int64_t element) const {
    return static_cast<const char*>(view_.data) + element * size_;
  }

  // Rows whose token n0 lies at element `at`.
  HeadRows rows(const void* data, int64_t at, int64_t stride, int32_t n0) const {
    return HeadRows({data, 0, stride, 0}, dtype_, at - n0 * stride, 0, columns_);
  }

  // A stored vector, in the dtype of the query.
  void copy(const void* from, char* row) const {
    if (cache_.type == CacheType::kQuery) {
      std::memcpy(row, from, static_cast<size_t>(columns_ * size_));
      return;
    }
    if (dtype_ == DType::kFloat32) {
      load_stored(from, cache_.type, dtype_, 0, columns_, reinterpret_cast<float*>(row));
      return;
    }
    constexpr int64_t kPiece = 64;
    float piece[kPiece];
    for (int64_t d = 0; d < columns_; d += kPiece) {
      const int64_t count = std::min(kPiece, columns_ - d);
      load_stored(from, cache_.type, dtype_, d, count, piece);
      for (int64_t i = 0; i < count; i += 4) {
        Float4 four;
        std::memcpy(&four, piece + i, sizeof(four));
        store_four(row, dtype_, d + i, static_cast<int>(std::min<int64_t>(4, count - i)), four);
      }
    }
  }

  const PagedCache& cache_;
  const CacheView& view_;
  const int32_t* table_;
  const DType dtype_;  // of the query
  const int64_t size_, columns_;
};

// Keys or values of a sequence.
class TokenSource {
 public:
  TokenSource(const AttentionProblem& problem, const AttentionTask& task, bool values)
      : view_(values ? problem.value : problem.key),
        dtype_(problem.dtype),
        begin_(values ? task.value : task.key),
        columns_(values ? problem.value_dim : problem.head_dim) {
    if (task.cache == nullptr) return;
    pages_.emplace(*task.cache, values ? task.cache->value : task.cache->key, problem.dtype,
                   task.batch, columns_);
  }

  // See PagedRows.
  HeadRows block(int64_t head, int32_t n0, int32_t count, uint64_t seen, float* memory) const {
    return pages_ ? pages_->block(head, n0, count, seen, memory) : rows(head);
  }
  // Tokens [begin, end) of so many heads into the second level of cache.
  void fetch(int64_t head, int64_t heads, int32_t begin, int32_t end) const {
    const int64_t bytes = columns_ * size();
    for_tokens(head, begin, end, [&](const char* row) {
      for (int64_t h = 0; h < heads; ++h, row += head_stride()) {
        for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte, 0, 2);
      }
    });
  }
  // Their addresses as they follow each other in memory, kBlockKeys of them: more are left out,
  // `nothing` makes up for fewer. heads ≤ kBlockKeys; there is room for 2 · kBlockKeys.
  void list(int64_t head, int64_t heads, int32_t begin, int32_t end, const void* nothing,
            const void** vectors) const {
    int64_t count = 0;
    for_tokens(head, begin, end, [&](const char* row) {
      if (count >= kBlockKeys) return;
      for (int64_t h = 0; h < heads; ++h) vectors[count + h] = row + h * head_stride();
      count += heads;
    });
    for (; count < kBlockKeys; ++count) vectors[count] = nothing;
  }
  void locate(int64_t head, int32_t n0, int32_t count, uint64_t seen, const void* nothing,
              const void** rows) const {
    if (pages_) return pages_->locate(head, n0, count, seen, nothing, rows);
    this->rows(head).locate(n0, count, rows);
  }

 private:
  template <typename F>
  void for_tokens(int64_t head, int32_t begin, int32_t end, const F& f) const {
    if (pages_) return pages_->for_tokens(head, begin, end, f);
    const HeadRows tokens = rows(head);
    for (; begin < end; ++begin) f(tokens.address(begin));
  }
  int64_t size() const { return pages_ ? pages_->size() : size_of(dtype_); }
  int64_t head_stride() const {  // in bytes
    return pages_ ? pages_->head_stride() : view_.head_stride * size();
  }
  HeadRows rows(int64_t head) const { return HeadRows(view_, dtype_, begin_, head, columns_); }

  const TokenView& view_;
  const DType dtype_;
  const int64_t begin_, columns_;
  std::optional<PagedRows> pages_;
};

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
