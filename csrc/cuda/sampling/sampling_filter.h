// Which tokens of a source top_k, top_p and min_p leave.
#pragma once

#include "common/sampling_problem.h"
#include "cuda/sampling/sampling_select.h"
#include "cuda/sampling/sampling_source.h"

namespace pumice::cuda {

// A row's weights, exp((x - max) / temperature).
struct RowWeights {
  float max;
  SoftmaxScale scale;

  __device__ __forceinline__ float of(float logit) const {
    return softmax_weight(below_max(logit, max), scale);
  }
};

// The tokens from a logit on, of equals those up to an index, and of some weight at least.
struct KeptTokens {
  uint32_t key = 0;
  int32_t last_equal = INT32_MAX;
  float least_weight = 0.0f;

  __device__ __forceinline__ bool keeps(int32_t index, float logit, float weight) const {
    const uint32_t k = order_key(logit);
    return (k > key || (k == key && index <= last_equal)) && weight >= least_weight;
  }
};

// Where the running sum of a quantity, in the order of the vocabulary, reaches `need`.
template <class Source, class Quantity>
__device__ __forceinline__ int32_t find_token(const Source& source, int32_t vocab, Mass need,
                                              SelectShared& shared, Quantity&& quantity) {
  const Selected found = select(
      source, ~static_cast<uint32_t>(vocab - 1), ~0u, need, shared,
      [](int32_t index, float) { return ~static_cast<uint32_t>(index); }, quantity);
  return static_cast<int32_t>(~found.key);
}

// `source` holds all tokens, or at least the most probable ones up to the last that is kept; `all`
// is the mass of all tokens where only top_p filters, and else not looked at.
template <class Source>
__device__ __forceinline__ KeptTokens filter_tokens(const Source& source, int32_t count,
                                                    const RowFilter& filter, int32_t vocab,
                                                    const RowWeights& weights, Mass all,
                                                    SelectShared& shared) {
  const uint32_t max_key = order_key(weights.max);
  const auto key_of = [](int32_t, float logit) { return order_key(logit); };
  const auto mass_at = [&](int32_t, float logit) { return mass_of(weights.of(logit)); };
  KeptTokens kept;
  kept.least_weight = filter.least_weight;
  bool cut = false;  // by rank: of the tokens with the key, the first `equals` are kept
  Mass equals = 0;
  if (filter.top_k < count) {
    const auto k = static_cast<Mass>(filter.top_k);
    const Selected last =
        select(source, 0, max_key, k, shared, key_of, [](int32_t, float) { return Mass{1}; });
    kept.key = last.key;
    equals = k - last.before;
    cut = true;
  }
  if (filter.nucleus) {
    Mass larger = all, equal_mass = 0;  // the mass of larger keys, and of one token with the key
    if (filter.top_k < vocab) {
      larger = block_sum_of(source, shared.warps, [&](int32_t index, float logit) {
        return order_key(logit) > kept.key ? mass_at(index, logit) : 0;
      });
    }
    if (cut) equal_mass = mass_of(weights.of(float_of_order_key(kept.key)));
    Mass need = least_part_of(larger + equals * equal_mass, filter.top_p);
    need = need > 0 ? need : 1;
    if (need <= larger) {
      const Selected last =
          select(source, cut ? kept.key + 1 : 0, max_key, need, shared, key_of, mass_at);
      kept.key = last.key;
      equal_mass = mass_of(weights.of(float_of_order_key(last.key)));
      larger = last.before;
    }
    equals = (need - larger + equal_mass - 1) / equal_mass;
    cut = true;
  }
  if (!cut) return kept;
  const auto is_equal = [&](int32_t, float logit) {
    return Mass{order_key(logit) == kept.key ? 1u : 0u};
  };
  if (block_sum_of(source, shared.warps, is_equal) > equals) {
    kept.last_equal = find_token(source, vocab, equals, shared, is_equal);
  }
  return kept;
}

}  // namespace pumice::cuda
