// Rows of a 2:4 weight that are multiplied at a time, and what the kernels for few rows share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/element.h"
#include "cpu/sparse24_kernels.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

// kN rows, columns of y; past the end the last one again.
template <int kN>
struct Sparse24Rows {
  const char* values[kN];
  const uint8_t* meta[kN];
  // Memory is the limit, and hardware prefetchers stop at the end of a page: rows to come are
  // fetched into L2 by hand, so many bytes from those that are read. At the end there are none.
  int64_t values_ahead, meta_ahead;

  // Rows begin … end - 1 of n, of row_bytes of values for K columns.
  Sparse24Rows(const void* all_values, int64_t row_bytes, const uint8_t* all_meta, int64_t k,
               int64_t n, int64_t begin, int64_t end) {
    constexpr int64_t kAhead = 8;  // rows
    const int64_t meta_bytes = sparse24_meta_bytes(k);
    for (int j = 0; j < kN; ++j) {
      const int64_t row = std::min(begin + j, end - 1);
      values[j] = static_cast<const char*>(all_values) + row * row_bytes;
      meta[j] = all_meta + row * meta_bytes;
    }
    const bool last = begin + kAhead + kN > n;
    values_ahead = last ? 0 : kAhead * row_bytes;
    meta_ahead = last ? 0 : kAhead * meta_bytes;
  }

  // Called with the bytes that are read next: a cache line is fetched where one begins. Always
  // inline: GCC takes a function of prefetches alone for one without effects, and drops the call.
  inline __attribute__((always_inline)) void prefetch(int64_t of_values, int64_t of_meta) const {
#if defined(__x86_64__)
    if (of_values % 64 == 0) {
#pragma GCC unroll 4
      for (int j = 0; j < kN; ++j) __builtin_prefetch(values[j] + values_ahead + of_values, 0, 2);
    }
    if (of_meta % 64 == 0) {
#pragma GCC unroll 4
      for (int j = 0; j < kN; ++j) __builtin_prefetch(meta[j] + meta_ahead + of_meta, 0, 2);
    }
#endif
  }
};

inline Float4 load_four(const VectorView& bias, int64_t n, int count) {
  Float4 four = {};
  for (int j = 0; j < count && bias.data; ++j) four[j] = load_element(bias.data, bias.dtype, n + j);
  return four;
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
