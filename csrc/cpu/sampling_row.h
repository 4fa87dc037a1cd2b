// One row of logits, in chunks: its largest value, weights, and where a running sum passes a
// number. The loops are plain ones that the compiler vectorises for each instruction set.
#pragma once

#include <algorithm>
#include <limits>

#include "cpu/attention_vector.h"
#include "cpu/element.h"
#include "cpu/sampling_kernels.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

// The largest of `count` numbers; NaN is none.
inline float largest_of(const float* x, int64_t count) {
  Vec largest = broadcast(kNothing), other = largest;
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    largest = maximum(load(x + i), largest);
    other = maximum(load(x + i + kLanes), other);
  }
  float lanes[kLanes], result = kNothing;
  store(lanes, maximum(other, largest));
  for (int lane = 0; lane < kLanes; ++lane) result = std::max(result, lanes[lane]);
  for (; i < count; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

// A chunk of a row of floats, a copy where the row is not of floats.
struct LogitChunk {
  const float* at;
  int64_t begin, count;
};

struct LogitRow {
  const void* data;
  DType dtype;
  int64_t begin, vocab;

  // `copy` has room for a chunk.
  LogitChunk chunk(int64_t index, float* copy) const {
    const int64_t first = index * kSamplingChunk;
    const int64_t count = std::min(kSamplingChunk, vocab - first);
    if (dtype == DType::kFloat32) {
      return {static_cast<const float*>(data) + begin + first, first, count};
    }
    load_elements(data, dtype, begin + first, count, copy);
    return {copy, first, count};
  }
};

struct Maximum {
  float value;
  int64_t token;  // the first one
};

// The row's maximum, and in `maxima` that of each chunk.
inline Maximum find_maximum(const LogitRow& row, float* maxima) {
  float copy[kSamplingChunk];
  const int64_t chunks = sampling_chunks(row.vocab);
  Maximum found = {kNothing, 0};
  int64_t where = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    const LogitChunk chunk = row.chunk(c, copy);
    maxima[c] = largest_of(chunk.at, chunk.count);
    if (maxima[c] > found.value) {
      found.value = maxima[c];
      where = c;
    }
  }
  if (found.value == kNothing) return found;
  const LogitChunk chunk = row.chunk(where, copy);
  for (int64_t i = 0; i < chunk.count; ++i) {
    if (chunk.at[i] == found.value) {
      found.token = chunk.begin + i;
      break;
    }
  }
  return found;
}

// weights[i] = exp((x[i] - max) / temperature); their mass.
inline Mass weigh(const float* x, int64_t count, float max, SoftmaxScale scale, float* weights) {
  for (int64_t i = 0; i < count; ++i) weights[i] = softmax_weight(below_max(x[i], max), scale);
  Mass mass = 0;
  for (int64_t i = 0; i < count; ++i) mass += mass_of(weights[i]);
  return mass;
}

// The tokens above a logit, of those equal to it the ones up to some token; and of these the ones
// of some weight at least, which are none below another logit.
struct KeptTokens {
  bool all = true;
  float logit = kNothing;
  int64_t last_equal = kMaxVocab;
  float least_weight = 0.0f, least_logit = kNothing;

  bool may_keep(float chunk_maximum) const {
    return chunk_maximum >= logit && chunk_maximum >= least_logit;
  }
};

// The weights of those of a chunk's tokens that are kept, 0 for the others; their mass.
inline Mass weigh_kept(const LogitChunk& chunk, float max, SoftmaxScale scale,
                       const KeptTokens& kept, float* weights) {
  const Mass all = weigh(chunk.at, chunk.count, max, scale, weights);
  if (kept.all) return all;
  const auto last = static_cast<int32_t>(kept.last_equal - chunk.begin);
  const auto count = static_cast<int32_t>(chunk.count);
  for (int32_t i = 0; i < count; ++i) {
    const float x = chunk.at[i], weight = weights[i];
    const bool ranks = (x > kept.logit) | ((x == kept.logit) & (i <= last));
    weights[i] = ranks & (weight >= kept.least_weight) ? weight : 0.0f;
  }
  Mass mass = 0;
  for (int32_t i = 0; i < count; ++i) mass += mass_of(weights[i]);
  return mass;
}

// The chunk in which the running sum of masses passes `target`, which is then what is left of it.
inline int64_t passing_chunk(const Mass* masses, int64_t chunks, Mass& target) {
  int64_t c = 0;
  for (; c + 1 < chunks && masses[c] <= target; ++c) target -= masses[c];
  return c;
}

// The same among the weights of a chunk.
inline int64_t passing_weight(const float* weights, int64_t count, Mass target) {
  int64_t i = 0;
  for (; i + 1 < count; ++i) {
    const Mass mass = mass_of(weights[i]);
    if (mass > target) break;
    target -= mass;
  }
  return i;
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
