// One row of a block of the score matrix, from products to gradients.
#pragma once

#include <limits>

#include "common/attention_score.h"
#include "cpu/attention_exp.h"
#include "cpu/attention_vector.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

// The query of a row, among the keys of a block.
struct GradRow {
  uint64_t seen;     // bit j: key j of the block
  int32_t distance;  // the query's position less that of key 0
  float lse, delta;
};

// From s = softmax_scale · q·k: the score, and its slope along q·k (attention_score.h). The options
// are compile-time: GCC 12 turns a branch on a float into a blend of registers under the one-lane
// mask of that comparison.
template <bool kSoftcap, bool kAlibi>
PUMICE_VECTOR Vec score_and_slope(const ScoreRule& rule, float alibi_slope, int32_t distance,
                                  Vec score, Vec* slope) {
  *slope = broadcast(rule.softmax_scale);
  if constexpr (kSoftcap) {
    const Vec t = tanh(divide(score, broadcast(rule.softcap)));
    score = multiply(broadcast(rule.softcap), t);
    *slope = multiply(*slope, subtract(broadcast(1.0f), multiply(t, t)));
  }
  if constexpr (kAlibi) {
    float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(distance - i);
    score = subtract(score, multiply(broadcast(alibi_slope), magnitude(load(lanes))));
  }
  return score;
}

// p: q·k becomes P = exp(score - lse);  ds: grad_out·value becomes dS = P · (ds - delta) · slope.
// Both 0 where hidden. `keys` is a multiple of kLanes.
template <bool kSoftcap, bool kAlibi>
inline void differentiate_row(const ScoreRule& rule, float alibi_slope, const GradRow& row,
                              int64_t keys, float* p, float* ds) {
  const Vec scale = broadcast(rule.softmax_scale), log2e = broadcast(kLog2E);
  const Vec lse = broadcast(row.lse), delta = broadcast(row.delta);
  const Vec hidden = broadcast(-std::numeric_limits<float>::infinity());
  for (int64_t j = 0; j < keys; j += kLanes) {
    Vec slope;
    const Vec product = multiply(load(p + j), scale);
    const int32_t distance = row.distance - static_cast<int32_t>(j);
    const Vec score =
        score_and_slope<kSoftcap, kAlibi>(rule, alibi_slope, distance, product, &slope);
    const Vec exponent = multiply(subtract(score, lse), log2e);
    const Vec weight = exp2(select(static_cast<uint32_t>(row.seen >> j), exponent, hidden));
    store(p + j, weight);
    store(ds + j, multiply(multiply(weight, subtract(load(ds + j), delta)), slope));
  }
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
