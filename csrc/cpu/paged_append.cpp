// kernel: cache_append
//
// A token's key is rotated (Su et al., 2021, "RoFormer") in float and rounded once, to what the
// cache stores:  a' = a·cos - b·sin,  b' = b·cos + a·sin  for each pair (a, b) of its elements.
#include <algorithm>
#include <cstring>

#include "cpu/cache_element.h"
#include "cpu/paged_kernels.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

// Elements at a time, on the stack.
constexpr int64_t kPiece = 64;

// Where a vector goes, and as what.
struct Destination {
  void* data;
  CacheType type;
  DType dtype;
  float scale;
  int64_t begin;

  void store(int64_t d, int64_t count, const float* x) const {
    const int64_t at = begin + d;
    if (type == CacheType::kFloat8E4M3) {
      uint8_t* out = static_cast<uint8_t*>(data) + at;
      for (int64_t i = 0; i < count; ++i) out[i] = float_to_float8(x[i] / scale);
    } else if (type == CacheType::kInt8) {
      int8_t* out = static_cast<int8_t*>(data) + at;
      for (int64_t i = 0; i < count; ++i) out[i] = float_to_int8(x[i] / scale);
    } else {
      for (int64_t i = 0; i < count; ++i) store_element(data, dtype, at + i, x[i]);
    }
  }
};

// Elements [d, end) of the vector at `begin` as they are.
void copy(const void* x, DType dtype, int64_t begin, int64_t d, int64_t end,
          const Destination& to) {
  if (to.type == CacheType::kQuery) {
    const int64_t size = size_of(dtype);
    std::memcpy(static_cast<char*>(to.data) + (to.begin + d) * size,
                static_cast<const char*>(x) + (begin + d) * size,
                static_cast<size_t>((end - d) * size));
    return;
  }
  float piece[kPiece];
  for (; d < end; d += kPiece) {
    const int64_t count = std::min(kPiece, end - d);
    load_elements(x, dtype, begin + d, count, piece);
    to.store(d, count, piece);
  }
}

void rotate_halves(const CacheAppend& job, int64_t begin, const float* cos, const float* sin,
                   const Destination& to) {
  float a[kPiece], b[kPiece], first[kPiece], second[kPiece];
  for (int64_t p = 0; p < job.rotary_pairs; p += kPiece) {
    const int64_t count = std::min(kPiece, job.rotary_pairs - p);
    load_elements(job.key.data, job.dtype, begin + p, count, a);
    load_elements(job.key.data, job.dtype, begin + job.rotary_pairs + p, count, b);
    for (int64_t i = 0; i < count; ++i) {
      first[i] = a[i] * cos[p + i] - b[i] * sin[p + i];
      second[i] = b[i] * cos[p + i] + a[i] * sin[p + i];
    }
    to.store(p, count, first);
    to.store(job.rotary_pairs + p, count, second);
  }
}

void rotate_neighbours(const CacheAppend& job, int64_t begin, const float* cos, const float* sin,
                       const Destination& to) {
  float x[2 * kPiece], rotated[2 * kPiece];
  for (int64_t p = 0; p < job.rotary_pairs; p += kPiece) {
    const int64_t count = std::min(kPiece, job.rotary_pairs - p);
    load_elements(job.key.data, job.dtype, begin + 2 * p, 2 * count, x);
    for (int64_t i = 0; i < count; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      rotated[2 * i] = a * cos[p + i] - b * sin[p + i];
      rotated[2 * i + 1] = b * cos[p + i] + a * sin[p + i];
    }
    to.store(2 * p, 2 * count, rotated);
  }
}

void append(const CacheAppend& job, int64_t begin, int64_t end) {
  const PagedCache& cache = job.cache;
  for (int64_t t = begin; t < end; ++t) {
    if (job.slots[t] < 0) continue;
    const int64_t block = job.slots[t] / cache.block_size;
    const auto slot = static_cast<int32_t>(job.slots[t] % cache.block_size);
    for (int64_t h = 0; h < job.kv_heads; ++h) {
      const Destination key{job.key_cache, cache.type, job.dtype, cache.key_scale_of(h),
                            cache.key.at(block, slot, h)};
      const int64_t from = t * job.key.token_stride + h * job.key.head_stride;
      if (job.rotary_pairs > 0) {
        const int64_t row = job.positions[t] * job.rotary_pairs;
        const auto& rotate = job.interleaved ? rotate_neighbours : rotate_halves;
        rotate(job, from, job.cos + row, job.sin + row, key);
      }
      copy(job.key.data, job.dtype, from, 2 * job.rotary_pairs, job.head_dim, key);
      const Destination value{job.value_cache, cache.type, job.dtype, cache.value_scale_of(h),
                              cache.value.at(block, slot, h)};
      copy(job.value.data, job.dtype, t * job.value.token_stride + h * job.value.head_stride, 0,
           job.value_dim, value);
    }
  }
}

}  // namespace

const PagedKernels paged_kernels = {append};

}  // namespace pumice::cpu::PUMICE_ISA
