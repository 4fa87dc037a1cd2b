// The tokens of a row that top_k, top_p and min_p leave, as candidates in the order of the
// vocabulary.
#pragma once

#include <cmath>

#include "cpu/sampling_row.h"
#include "cpu/sampling_select.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

struct FilteredRow {
  const LogitRow& row;
  const RowFilter& filter;
  const SamplingScratch& scratch;
  float max;

  // The mass of all tokens.
  Mass total() const {
    float copy[kSamplingChunk], weights[kSamplingChunk];
    Mass sum = 0;
    for (int64_t c = 0; c < sampling_chunks(row.vocab); ++c) {
      const LogitChunk chunk = row.chunk(c, copy);
      sum += weigh(chunk.at, chunk.count, max, filter.scale, weights);
    }
    return sum;
  }

  // A logit below which nothing is kept: it spares looking at most tokens, and decides nothing.
  // `all` is the mass of all tokens, where only top_p filters.
  float bound(Mass all) const {
    const int64_t chunks = sampling_chunks(row.vocab);
    float bound = kNothing;
    if (filter.top_k < row.vocab) {
      // k chunks have maxima not below the k-th largest maximum, hence so many tokens are not.
      if (filter.top_k <= chunks) bound = kth_maximum(filter.top_k);
    } else if (filter.nucleus) {
      bound = least_logit_of(nucleus_weight_of(filter.top_p, all, row.vocab), max, filter.scale);
    }
    // The mass that top_p is a part of may be that of tokens which min_p removes.
    if (filter.least_weight > 0 && !filter.nucleus) {
      bound = std::max(bound, least_logit_of(filter.least_weight, max, filter.scale));
    }
    return std::isfinite(max) ? bound : kNothing;
  }

  float kth_maximum(int64_t k) const {
    const int64_t chunks = sampling_chunks(row.vocab);
    for (int64_t c = 0; c < chunks; ++c) {
      scratch.reordered[c] = {order_of(scratch.maxima[c], c), 1};
    }
    return logit_of(last_leading(scratch.reordered, chunks, static_cast<Mass>(k),
                                 [](const Candidate&) { return Mass{1}; }));
  }

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

  float weight_of(const Candidate& candidate) const {
    return softmax_weight(below_max(logit_of(candidate.order), max), filter.scale);
  }

  // Keeps the candidates from an order on; the order of the vocabulary stays.
  int64_t keep_from(uint64_t order, int64_t count) const {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Candidate candidate = scratch.candidates[i];
      scratch.candidates[kept] = candidate;
      kept += candidate.order >= order ? 1 : 0;
    }
    return kept;
  }

  template <class Quantity>
  int64_t keep_leading(int64_t count, Mass need, Quantity quantity) const {
    std::copy(scratch.candidates, scratch.candidates + count, scratch.reordered);
    return keep_from(last_leading(scratch.reordered, count, need, quantity), count);
  }

  // How many are left, in scratch.candidates; at least one.
  int64_t run() const {
    const bool only_top_p = filter.nucleus && filter.top_k == row.vocab;
    Mass mass = only_top_p ? total() : 0;
    int64_t count = collect(bound(mass));
    if (filter.top_k < count) {
      count = keep_leading(count, static_cast<Mass>(filter.top_k),
                           [](const Candidate&) { return Mass{1}; });
    }
    for (int64_t i = 0; i < count; ++i) {
      scratch.candidates[i].mass = mass_of(weight_of(scratch.candidates[i]));
    }
    if (filter.nucleus) {
      if (!only_top_p) {
        for (int64_t i = 0; i < count; ++i) mass += scratch.candidates[i].mass;
      }
      const Mass need = std::max<Mass>(1, least_part_of(mass, filter.top_p));
      count = keep_leading(count, need, [](const Candidate& c) { return c.mass; });
    }
    if (filter.least_weight > 0) {
      int64_t kept = 0;
      for (int64_t i = 0; i < count; ++i) {
        const Candidate candidate = scratch.candidates[i];
        scratch.candidates[kept] = candidate;
        kept += weight_of(candidate) >= filter.least_weight ? 1 : 0;
      }
      count = kept;
    }
    return count;
  }
};

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
