// Which candidates the filters keep: exact, in expected linear time, without sorting.
#pragma once

#include <algorithm>

#include "cpu/sampling_kernels.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

inline uint64_t order_of(float logit, int64_t token) {
  return static_cast<uint64_t>(order_key(logit)) << 32 |
         (0xffffffffu - static_cast<uint32_t>(token));
}

inline int64_t token_of(uint64_t order) {
  return static_cast<int64_t>(0xffffffffu - static_cast<uint32_t>(order));
}

inline float logit_of(uint64_t order) {
  return float_of_order_key(static_cast<uint32_t>(order >> 32));
}

// The order of the last of those leading candidates whose quantities together reach `need`; of the
// last of all, where they do not. Candidates, at least one and no two of one order, are rearranged:
// quickselect (Hoare, 1961), with sums for counts.
template <class Quantity>
uint64_t last_leading(Candidate* candidates, int64_t count, Mass need, Quantity quantity) {
  int64_t begin = 0, end = count;
  uint64_t state = 0x9e3779b97f4a7c15u;
  const auto below = [&](int64_t n) {  // a number that no order of the input can foresee
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<int64_t>((state >> 33) % static_cast<uint64_t>(n));
  };
  while (end - begin > 1) {
    // The larger of two is not the last of all, so that both parts are smaller than the whole.
    const int64_t size = end - begin, one = below(size), other = (one + 1 + below(size - 1)) % size;
    const uint64_t pivot = std::max(candidates[begin + one].order, candidates[begin + other].order);
    int64_t middle = begin;
    Mass sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      const Candidate candidate = candidates[i];
      candidates[i] = candidates[middle];
      candidates[middle] = candidate;
      const bool leading = candidate.order >= pivot;
      sum += leading ? quantity(candidate) : 0;
      middle += leading ? 1 : 0;
    }
    if (sum >= need) {
      end = middle;
    } else {
      need -= sum;
      begin = middle;
    }
  }
  return candidates[begin].order;
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
