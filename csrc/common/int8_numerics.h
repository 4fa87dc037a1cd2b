// The numbers of the int8 operators, the same on every device: host and device code include this
// file, so that a tensor quantizes to the same bits everywhere.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace pumice {

constexpr float kInt8Max = 127.0f;

// Below this absolute maximum a row is zero for int8: 127 / absmax must stay finite.
constexpr float kTinyAbsmax = 7.888609e-31f;  // 2^-100

// int32 sums of K products of two int8 values, each at most 2^14, must not overflow.
constexpr int64_t kMaxInt8K = (int64_t{1} << 17) - 1;

// Not `>=`: a NaN is an outlier too, and so is an infinity under an infinite threshold.
PUMICE_HOST_DEVICE bool is_outlier(float x, float threshold) { return !(fabsf(x) < threshold); }

PUMICE_HOST_DEVICE float int8_scale(float absmax) {
  return absmax < kTinyAbsmax ? 0.0f : absmax / kInt8Max;
}

PUMICE_HOST_DEVICE float int8_inverse_scale(float absmax) {
  return absmax < kTinyAbsmax ? 0.0f : kInt8Max / absmax;
}

// x · inverse_scale is at most 127 (1 + 2^-23) in magnitude, so rounding needs no clamp.
PUMICE_HOST_DEVICE int32_t int8_round(float x, float inverse_scale) {
  return static_cast<int32_t>(rintf(x * inverse_scale));
}

}  // namespace pumice
