// The tokens of a row that top_k, top_p and min_p leave.
#pragma once

#include <cmath>

#include "cpu/sampling_row.h"
#include "cpu/sampling_select.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

// Logits go into buckets of an eighth of a power of two of their weights, down to where weights
// round to no mass. Falling logits have rising buckets.
constexpr int32_t kBucketsPerPower = 8;
constexpr int32_t kBuckets = 42 * kBucketsPerPower;

inline void find_buckets(const float* x, int64_t count, float max, SoftmaxScale scale,
                         int32_t* buckets) {
  for (int64_t i = 0; i < count; ++i) {
    const float exponent = below_max(x[i], max) * scale.high;
    const float bounded = exponent > -42.0f ? exponent : -42.0f;  // and for NaN
    buckets[i] = static_cast<int32_t>(bounded * -static_cast<float>(kBucketsPerPower));
  }
}

// Chooses what to keep of a row whose chunks have `scratch.maxima`.
struct RowFiltering {
  const LogitRow& row;
  const RowFilter& filter;
  const SamplingScratch& scratch;
  float max;

  KeptTokens run() const {
    KeptTokens kept;
    kept.all = false;
    kept.least_weight = filter.least_weight;
    kept.least_logit = least_logit();
    if (filter.top_k < row.vocab) {
      keep_top_k(kept);
    } else if (filter.nucleus) {
      keep_from(kept, last_by_buckets(Quantity::kMass));
    }
    return kept;
  }

 private:
  static void keep_from(KeptTokens& kept, uint64_t last) {
    kept.logit = logit_of(last);
    kept.last_equal = token_of(last);
  }

  // A logit below which min_p leaves nothing.
  float least_logit() const {
    return std::isfinite(max) ? least_logit_of(filter.least_weight, max, filter.scale) : kNothing;
  }

  // The k-th largest logit is not below the k-th largest maximum of a chunk.
  float kth_maximum(int64_t k) const {
    const int64_t chunks = sampling_chunks(row.vocab);
    for (int64_t c = 0; c < chunks; ++c) {
      scratch.candidates[c] = {order_of(scratch.maxima[c], c), 0};
    }
    return logit_of(last_leading(scratch.candidates, chunks, static_cast<Mass>(k), one));
  }

  static Mass one(const Candidate&) { return 1; }

  // top_k, and top_p of what that leaves.
  void keep_top_k(KeptTokens& kept) const {
    int64_t count = 0;
    if (filter.top_k <= sampling_chunks(row.vocab)) {
      // The mass that top_p is a part of may be that of tokens which min_p removes.
      kept.logit =
          std::max(kth_maximum(filter.top_k), filter.nucleus ? kNothing : kept.least_logit);
      count = collect(kept.logit);
      if (filter.top_k < count) {
        keep_from(kept,
                  last_leading(scratch.candidates, count, static_cast<Mass>(filter.top_k), one));
        count = keep_candidates(kept, count);
      }
    } else {
      keep_from(kept, last_by_buckets(Quantity::kCount));
      if (filter.nucleus) count = keep_candidates(kept, collect(kept.logit));
    }
    if (!filter.nucleus) return;
    Mass mass = 0;
    for (int64_t i = 0; i < count; ++i) {
      const float below = below_max(logit_of(scratch.candidates[i].order), max);
      scratch.candidates[i].mass = mass_of(softmax_weight(below, filter.scale));
      mass += scratch.candidates[i].mass;
    }
    keep_from(kept, last_leading(scratch.candidates, count, needed_of(mass), of_mass));
  }

  static Mass of_mass(const Candidate& candidate) { return candidate.mass; }

  Mass needed_of(Mass all) const { return std::max<Mass>(1, least_part_of(all, filter.top_p)); }

  // Tokens from a logit on.
  int64_t collect(float bound) const {
    float copy[kSamplingChunk];
    int64_t count = 0;
    for (int64_t c = 0; c < sampling_chunks(row.vocab); ++c) {
      if (!(scratch.maxima[c] >= bound)) continue;
      const LogitChunk chunk = row.chunk(c, copy);
      for (int64_t i = 0; i < chunk.count; ++i) {
        const float x = chunk.at[i];
        scratch.candidates[count] = {order_of(x, chunk.begin + i), 0};
        count += x >= bound ? 1 : 0;
      }
    }
    return count;
  }

  int64_t keep_candidates(const KeptTokens& kept, int64_t count) const {
    const uint64_t last = order_of(kept.logit, kept.last_equal);
    int64_t left = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Candidate candidate = scratch.candidates[i];
      scratch.candidates[left] = candidate;
      left += candidate.order >= last ? 1 : 0;
    }
    return left;
  }

  enum class Quantity { kCount, kMass };

  // The last token of top_k, or of top_p alone: the bucket in which the sum reaches the need, then
  // the token within it.
  uint64_t last_by_buckets(Quantity quantity) const {
    float copy[kSamplingChunk], weights[kSamplingChunk];
    int32_t buckets[kSamplingChunk];
    const bool counts = quantity == Quantity::kCount;
    Mass sums[2][kBuckets + 1] = {};  // in turns: additions to one bucket wait for each other
    Mass all = 0;
    for (int64_t c = 0; c < sampling_chunks(row.vocab); ++c) {
      const LogitChunk chunk = row.chunk(c, copy);
      find_buckets(chunk.at, chunk.count, max, filter.scale, buckets);
      if (counts) {
        for (int64_t i = 0; i < chunk.count; ++i) ++sums[i % 2][buckets[i]];
      } else {
        all += weigh(chunk.at, chunk.count, max, filter.scale, weights);
        for (int64_t i = 0; i < chunk.count; ++i) sums[i % 2][buckets[i]] += mass_of(weights[i]);
      }
    }
    Mass need = counts ? static_cast<Mass>(filter.top_k) : needed_of(all);
    int32_t bucket = 0;
    for (; bucket < kBuckets; ++bucket) {
      const Mass sum = sums[0][bucket] + sums[1][bucket];
      if (sum >= need) break;
      need -= sum;
    }
    int64_t count = 0;
    for (int64_t c = 0; c < sampling_chunks(row.vocab); ++c) {
      int32_t first;
      find_buckets(&scratch.maxima[c], 1, max, filter.scale, &first);
      if (first > bucket) continue;
      const LogitChunk chunk = row.chunk(c, copy);
      weigh(chunk.at, chunk.count, max, filter.scale, weights);
      find_buckets(chunk.at, chunk.count, max, filter.scale, buckets);
      for (int64_t i = 0; i < chunk.count; ++i) {
        if (buckets[i] != bucket) continue;
        const Mass quantity_of_token = counts ? 1 : mass_of(weights[i]);
        scratch.candidates[count++] = {order_of(chunk.at[i], chunk.begin + i), quantity_of_token};
      }
    }
    return last_leading(scratch.candidates, count, need, of_mass);
  }
};

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
