// From the product q·k to the score whose softmax is taken, and back, the same on every device:
//
//     s = softmax_scale · (q·k)                     without softcap
//     s = softcap · tanh(softmax_scale · (q·k) / softcap)
//     score = s - slope · |p - j|                   with ALiBi
#pragma once

#include <cmath>

#include "common/host_device.h"

namespace pumice {

struct ScoreRule {
  float softmax_scale;
  float softcap;               // 0: none
  const float* alibi_slopes;   // [B, H] or null
  int64_t alibi_batch_stride;  // 0: one for all
  const float* sinks;          // [H] or null: a logit that takes part in the softmax's sum only
};

PUMICE_HOST_DEVICE float attention_score(float product, float softmax_scale, float softcap) {
  const float s = product * softmax_scale;
  return softcap > 0.0f ? softcap * tanhf(s / softcap) : s;
}

// ds / d(q·k), from s before ALiBi.
PUMICE_HOST_DEVICE float attention_score_slope(float s, float softmax_scale, float softcap) {
  if (!(softcap > 0.0f)) return softmax_scale;
  const float t = s / softcap;
  return softmax_scale * (1.0f - t * t);
}

PUMICE_HOST_DEVICE float alibi_bias(float slope, int32_t position, int32_t key) {
  const int32_t distance = position > key ? position - key : key - position;
  return -slope * static_cast<float>(distance);
}

}  // namespace pumice
