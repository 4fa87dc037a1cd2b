// The online softmax of a block of rows (Milakov & Gimelshein, 2018; FlashAttention-2): products
// q·k become probabilities relative to a running reference, and what was summed before is rescaled
// when the reference moves.
//
// Scores are kept in units of ln 2, so that 2^x serves for e^x. The reference of a row is not its
// greatest score but may fall short of it by kSlack: probabilities up to 2^kSlack lose nothing in
// float, and most rows then never move it again after their first block.
#pragma once

#include <cmath>
#include <limits>

#include "common/attention_score.h"
#include "cpu/attention_exp.h"
#include "cpu/attention_visible.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr float kSlack = 8.0f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What makes a score of the products of one row with keys n0, n0 + 1, … Whether there is a softcap
// or ALiBi is known when it is compiled: the loop over keys has no branch, which would cost as much
// as the rest of it (and with which GCC 12 vectorised a loop like it wrongly).
template <bool kSoftcap, bool kAlibi>
struct RowScore {
  float scale;  // softmax_scale / ln 2; without the division where softcap follows
  float softcap;
  float slope;       // of ALiBi, over ln 2
  int32_t distance;  // p - n0

  PUMICE_VECTOR Vec operator()(Vec product, int column) const {
    Vec score = multiply(product, broadcast(scale));
    if constexpr (kSoftcap) {
      score = tanh(multiply(score, broadcast(1.0f / softcap)));
      score = multiply(score, broadcast(softcap * kLog2E));
    }
    if constexpr (kAlibi) {
      float lanes[kLanes];
      for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(distance - column - i);
      score = subtract(score, multiply(broadcast(slope), magnitude(load(lanes))));
    }
    return score;
  }
};

// The running state of a row: the reference, and the sum of 2^(score - reference) by lanes.
struct RowState {
  float* reference;  // -∞ until a key is seen
  float* sums;       // [kLanes]
};

// products[first, last) become probabilities, 0 where `visible` (if kPartial) has no bit; first and
// last are multiples of kLanes. Returns what to multiply earlier sums with.
template <bool kPartial, class Rule>
inline float softmax_row(float* products, int first, int last, uint64_t visible, const Rule& rule,
                         const RowState& state) {
  Vec greatest = broadcast(-kInfinity);
  for (int j = first; j < last; j += kLanes) {
    Vec score = rule(load(products + j), j);
    if (kPartial) score = select(static_cast<uint32_t>(visible >> j), score, broadcast(-kInfinity));
    greatest = maximum(greatest, score);
    store(products + j, score);
  }
  float reference = *state.reference, factor = 1.0f;
  if (less(broadcast(reference + kSlack), greatest) != 0) {
    float lanes[kLanes];
    store(lanes, greatest);
    float moved = reference;
    for (int i = 0; i < kLanes; ++i) moved = lanes[i] > moved ? lanes[i] : moved;
    factor = std::exp2(reference - moved);
    *state.reference = reference = moved;
  }
  // Nothing seen yet: any finite reference makes 0 of -∞.
  const Vec subtrahend = broadcast(reference == -kInfinity ? 0.0f : reference);
  Vec total = multiply(load(state.sums), broadcast(factor));
  for (int j = first; j < last; j += kLanes) {
    const Vec p = exp2(subtract(load(products + j), subtrahend));
    total = add(total, p);
    store(products + j, p);
  }
  store(state.sums, total);
  return factor;
}

// The end of a row: what to multiply its sum of p·v with, and its lse. The sink is -∞ if none.
struct RowEnd {
  float factor, lse;
};
inline RowEnd finish_row(const RowState& state, float sink) {
  const float total = sum(load(state.sums)), reference = *state.reference * kLn2;
  if (reference == -kInfinity && total == 0.0f) return {0.0f, sink};
  if (sink == -kInfinity) return {1.0f / total, reference + std::log(total)};
  const float moved = sink > reference ? sink : reference;
  const float scale = std::exp(reference - moved);
  const float with_sink = total * scale + std::exp(sink - moved);
  return {scale / with_sink, moved + std::log(with_sink)};
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
