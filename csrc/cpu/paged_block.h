// Where a task's keys or values lie, one after the other or in the pages of a cache, a block of 64
// tokens at a time as attention_tile.h reads them. Pages are read in place where one holds the
// whole block, else brought together. Stored bytes become the query's type (which holds every one
// of them exactly), or float; their scale is left to the score and the sum.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>

#include "cpu/attention_tile.h"
#include "cpu/cache_element.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

// The vectors of one head of one sequence.
class PagedRows {
 public:
  PagedRows(const PagedCache& cache, const CacheView& view, DType dtype, int64_t batch,
            int64_t head, int64_t columns)
      : cache_(cache),
        view_(view),
        table_(cache.block_table + batch * cache.max_blocks),
        dtype_(dtype),
        head_(head),
        columns_(columns) {}

  // Tokens [begin, end) into the second level of cache, whatever of them will be seen.
  void fetch(int32_t begin, int32_t end) const {
    const int64_t size = cache_.type == CacheType::kQuery ? size_of(dtype_) : 1;
    for (int32_t token = begin; token < end;) {
      const int32_t slot = token % cache_.block_size;
      const int32_t run = std::min(end - token, cache_.block_size - slot);
      const int64_t block = table_[token / cache_.block_size];
      token += run;
      if (block < 0 || block >= cache_.num_blocks) continue;  // given back
      const char* row = static_cast<const char*>(view_.data) + view_.at(block, slot, head_) * size;
      for (int32_t r = 0; r < run; ++r, row += view_.slot_stride * size) {
        for (int64_t byte = 0; byte < columns_ * size; byte += 64) {
          __builtin_prefetch(row + byte, 0, 2);
        }
      }
    }
  }

  // Tokens [n0, n0 + count), of which those in `seen` are read, and no other page; brought together
  // in `memory`, [kBlockKeys, columns] floats, the unseen ones as 0.
  HeadRows block(int32_t n0, int32_t count, uint64_t seen, bool as_float, float* memory) const {
    const int32_t slot = n0 % cache_.block_size;
    const bool all_seen = (~seen & bit_range(0, count)) == 0;
    if (cache_.type == CacheType::kQuery && slot + count <= cache_.block_size && all_seen) {
      const int64_t at = view_.at(table_[n0 / cache_.block_size], slot, head_);
      return rows(view_.data, dtype_, at, view_.slot_stride, n0);
    }
    const DType dtype = as_float ? DType::kFloat32 : dtype_;
    HeadRows result = rows(memory, dtype, 0, columns_, n0);
    if (as_float && dtype_ == dtype && cache_.type == CacheType::kQuery && result.in_place()) {
      result.scattered = scatter(n0, count, seen, memory);
    } else {
      gather(n0, count, seen, dtype, memory);
    }
    return result;
  }

 private:
  // Where the rows of a block lie, written to `memory`; the unseen ones as one row of 0 behind.
  const float* const* scatter(int32_t n0, int32_t count, uint64_t seen, float* memory) const {
    const float** result = reinterpret_cast<const float**>(memory);
    float* nothing = memory + kBlockKeys * sizeof(float*) / sizeof(float);
    std::memset(nothing, 0, static_cast<size_t>(columns_) * sizeof(float));
    int32_t page = n0 / cache_.block_size, slot = n0 % cache_.block_size;
    for (int32_t t = 0; t < count; ++page, slot = 0) {
      const int32_t run = std::min(count - t, cache_.block_size - slot);
      const bool read = (seen >> t & bit_range(0, run)) != 0;
      const float* at =
          read ? static_cast<const float*>(view_.data) + view_.at(table_[page], slot, head_)
               : nothing;
      for (const int32_t end = t + run; t < end; ++t) {
        result[t] = (seen >> t & 1) != 0 ? at : nothing;
        at += read ? view_.slot_stride : 0;
      }
    }
    return result;
  }

  // Rows whose token n0 lies at element `at`.
  HeadRows rows(const void* data, DType dtype, int64_t at, int64_t stride, int32_t n0) const {
    return HeadRows({data, 0, stride, 0}, dtype, at - n0 * stride, 0, columns_);
  }

  void gather(int32_t n0, int32_t count, uint64_t seen, DType dtype, float* memory) const {
    int32_t page = n0 / cache_.block_size, slot = n0 % cache_.block_size;
    for (int32_t t = 0; t < count; ++page, slot = 0) {
      const int32_t run = std::min(count - t, cache_.block_size - slot);
      const bool read = (seen >> t & bit_range(0, run)) != 0;
      int64_t at = read ? view_.at(table_[page], slot, head_) : 0;
      if (dtype == DType::kFloat32 && cache_.type == CacheType::kQuery &&
          (~(seen >> t) & bit_range(0, run)) == 0) {
        for (int32_t r = 0; r < run; ++r) {
          load_elements(view_.data, dtype_, at + r * view_.slot_stride, columns_,
                        memory + (t + r) * columns_);
        }
        t += run;
        continue;
      }
      for (const int32_t end = t + run; t < end; ++t, at += view_.slot_stride) {
        char* row = reinterpret_cast<char*>(memory) + t * columns_ * size_of(dtype);
        if ((seen >> t & 1) != 0) {
          load(at, dtype, row);
        } else {
          std::memset(row, 0, static_cast<size_t>(columns_ * size_of(dtype)));
        }
      }
    }
  }

  void load(int64_t at, DType dtype, char* row) const {
    if (cache_.type == CacheType::kQuery && dtype == dtype_) {
      const int64_t size = size_of(dtype);
      std::memcpy(row, static_cast<const char*>(view_.data) + at * size,
                  static_cast<size_t>(columns_ * size));
    } else if (dtype == DType::kFloat32) {
      load_stored(view_.data, cache_.type, dtype_, at, columns_, reinterpret_cast<float*>(row));
    } else {
      constexpr int64_t kPiece = 64;
      float piece[kPiece];
      for (int64_t d = 0; d < columns_; d += kPiece) {
        const int64_t count = std::min(kPiece, columns_ - d);
        load_stored(view_.data, cache_.type, dtype_, at + d, count, piece);
        for (int64_t i = 0; i < count; i += 4) {
          Float4 four;
          std::memcpy(&four, piece + i, sizeof(four));
          store_four(row, dtype, d + i, static_cast<int>(std::min<int64_t>(4, count - i)), four);
        }
      }
    }
  }

  const PagedCache& cache_;
  const CacheView& view_;
  const int32_t* table_;
  const DType dtype_;  // of the query
  const int64_t head_, columns_;
};

// Of one of the two.
class TokenSource {
 public:
  TokenSource(const AttentionProblem& problem, const AttentionTask& task, bool values)
      : rows_(values ? problem.value : problem.key, problem.dtype, values ? task.value : task.key,
              task.head / problem.group(), values ? problem.value_dim : problem.head_dim) {
    if (task.cache == nullptr) return;
    pages_.emplace(*task.cache, values ? task.cache->value : task.cache->key, problem.dtype,
                   task.batch, task.head / problem.group(), rows_.columns);
  }

  // See PagedRows.
  HeadRows block(int32_t n0, int32_t count, uint64_t seen, bool as_float, float* memory) const {
    return pages_ ? pages_->block(n0, count, seen, as_float, memory) : rows_;
  }
  void fetch(int32_t begin, int32_t end) const {
    if (pages_) {
      pages_->fetch(begin, end);
    } else {
      rows_.fetch(begin, end);
    }
  }

 private:
  const HeadRows rows_;
  std::optional<PagedRows> pages_;
};

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
