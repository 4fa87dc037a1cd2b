// The numbers of the sampling operators, the same on every device, so that a token never depends on
// where, or in what order, its probabilities were added up.
//
// A weight exp((x - max) / T) is computed in fp32 by operations that round alike everywhere. Sums
// of weights are sums of integers, "masses", in units of 2^-40: exact, therefore in any order, and
// what is drawn from them is always a token.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace pumice {

// An integer in units of 2^-40. Weights and probabilities are at most 1, and at most 2^23 of them
// stay below 2^63.
using Mass = uint64_t;
constexpr Mass kUnitMass = Mass{1} << 40;
constexpr int64_t kMaxVocab = int64_t{1} << 23;

PUMICE_HOST_DEVICE uint32_t float_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}

PUMICE_HOST_DEVICE float float_of_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

// a + b, a - b and a·b, each rounded: nvcc would fuse a multiplication and an addition.
PUMICE_HOST_DEVICE float add_rounded(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

PUMICE_HOST_DEVICE float multiply_rounded(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// a·b - n rounded once, for a whole number n that is round(a·b) up to the rounding of the product.
// Without an instruction for it: the product is exact in double, and so is the difference, for it
// loses the leading bits.
PUMICE_HOST_DEVICE float multiply_reduce(float a, float b, float n) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, -n);
#elif defined(__FMA__)
  return __builtin_fmaf(a, b, -n);
#else
  return static_cast<float>(static_cast<double>(a) * static_cast<double>(b) -
                            static_cast<double>(n));
#endif
}

// log2(e) / temperature as the sum of two floats, so that a small probability is not that of
// another temperature.
struct SoftmaxScale {
  float high, low;
};

// For temperatures above 0; so small a one that its inverse overflows is a large one.
PUMICE_HOST_DEVICE SoftmaxScale softmax_scale_of(float temperature) {
  constexpr double kLog2E = 1.4426950408889634;
  const double quotient = kLog2E / static_cast<double>(temperature);
  const double scale = quotient < 1e30 ? quotient : 1e30;
  const float high = static_cast<float>(scale);
  return {high, static_cast<float>(scale - static_cast<double>(high))};
}

// x - max, where two infinities are equal. NaN for NaN.
PUMICE_HOST_DEVICE float below_max(float x, float max) { return x == max ? 0.0f : x - max; }

// exp(below / temperature) for below ≤ 0 with a relative error of 2^-22: at most 1, exactly 1 for
// 0; 0 for NaN, and where the result would be less than 2^-125.
PUMICE_HOST_DEVICE float softmax_weight(float below, SoftmaxScale scale) {
  constexpr float kLeast = -125.0f;
  constexpr float kRounder = 0x1.8p23f;  // leaves no bits for a fraction
  const float exponent = multiply_rounded(below, scale.high);
  const float bounded = exponent > kLeast ? exponent : kLeast;
  const float shifted = add_rounded(bounded, kRounder);
  const float n = add_rounded(shifted, -kRounder);
  const float r =
      add_rounded(multiply_reduce(below, scale.high, n), multiply_rounded(below, scale.low));
  // 2^r - 1 on [-1/2, 1/2], fitted to the least relative error of 2^r, 2^-23.3.
  float y = 0x1.5bba14p-10f;
  y = add_rounded(multiply_rounded(y, r), 0x1.3cea88p-7f);
  y = add_rounded(multiply_rounded(y, r), 0x1.c6b752p-5f);
  y = add_rounded(multiply_rounded(y, r), 0x1.ebf9bcp-3f);
  y = add_rounded(multiply_rounded(y, r), 0x1.62e42ap-1f);
  y = add_rounded(multiply_rounded(y, r), 1.0f);
  const float power = float_of_bits(float_bits(y) + (float_bits(shifted) << 23));  // y · 2^n
  return exponent > kLeast ? power : 0.0f;
}

// A logit from which on weights may be `weight` or more. Rounding errors of weights, 2^-22, and of
// the difference from the maximum are far below the margin.
PUMICE_HOST_DEVICE float least_logit_of(double weight, float max, SoftmaxScale scale) {
  if (!(weight > 0.0)) return -INFINITY;
  const double inverse = static_cast<double>(scale.high) + static_cast<double>(scale.low);
  const double below = (log2(weight) - 0x1p-16) / inverse;
  const double margin = 0x1p-20 * static_cast<double>(max < 0.0f ? -max : max);
  return static_cast<float>(static_cast<double>(max) + below - margin);
}

// A weight such that V tokens of less have together less than what top_p leaves out of `all`.
PUMICE_HOST_DEVICE double nucleus_weight_of(uint32_t top_p, Mass all, int64_t vocab) {
  const double left_out = (1.0 - top_p * 0x1p-32) * static_cast<double>(all);
  return 0.5 * left_out / static_cast<double>(vocab) / static_cast<double>(kUnitMass) - 0x1p-41;
}

// A weight or probability in [0, 1], rounded to a multiple of 2^-40: such is the last bit of a
// double in [2^12, 2^13).
PUMICE_HOST_DEVICE Mass mass_of(float p) {
  const double shifted = static_cast<double>(p) + 4096.0;
  uint64_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  return bits & ((uint64_t{1} << 52) - 1);
}

// ln of a token's probability: exp(below / temperature) of a total.
PUMICE_HOST_DEVICE float log_probability(float below, SoftmaxScale scale, Mass total) {
  constexpr double kLn2 = 0.6931471805599453;
  const double exponent = static_cast<double>(below) *
                          (static_cast<double>(scale.high) + static_cast<double>(scale.low));
  const double share = static_cast<double>(total) / static_cast<double>(kUnitMass);
  return static_cast<float>(exponent * kLn2 - log(share));
}

// 1 / mass, to multiply weights by.
PUMICE_HOST_DEVICE float inverse_of(Mass mass) {
  return static_cast<float>(static_cast<double>(kUnitMass) / static_cast<double>(mass));
}

// What came as a probability: NaN is 0, and nothing is more than 1.
PUMICE_HOST_DEVICE float as_probability(float p) { return p > 0.0f ? (p < 1.0f ? p : 1.0f) : 0.0f; }

// A number in [0, 1) in units of 2^-32. NaN is 0.
PUMICE_HOST_DEVICE uint32_t fraction_bits(float u) {
  if (!(u > 0.0f)) return 0;
  return u < 1.0f ? static_cast<uint32_t>(multiply_rounded(u, 0x1p32f)) : ~uint32_t{0};
}

// ⌊mass · fraction⌋, less than mass where that is not 0
PUMICE_HOST_DEVICE Mass part_of(Mass mass, uint32_t fraction) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(mass, static_cast<uint64_t>(fraction) << 32);
#else
  return static_cast<Mass>((static_cast<unsigned __int128>(mass) * fraction) >> 32);
#endif
}

// ⌈mass · fraction⌉
PUMICE_HOST_DEVICE Mass least_part_of(Mass mass, uint32_t fraction) {
  const bool exact = (static_cast<uint32_t>(mass) * fraction) == 0;
  return part_of(mass, fraction) + (exact ? 0 : 1);
}

// Whether a draft of which the target thinks p and which was drawn with probability q is kept:
// u < p / q, u = fraction · 2^-32.
PUMICE_HOST_DEVICE bool accepts(uint32_t fraction, float p, float q) {
  return static_cast<double>(fraction) * 0x1p-32 * static_cast<double>(q) < static_cast<double>(p);
}

// Unsigned integers in the order of the floats; NaN counts as -∞, and -0 equals 0.
PUMICE_HOST_DEVICE uint32_t order_key(float x) {
  constexpr uint32_t kSign = 0x80000000u, kMinusInfinity = 0xff800000u;
  const uint32_t bits = x == x ? float_bits(x) : kMinusInfinity;
  return (bits & kSign) != 0 && bits != kSign ? ~bits : bits | kSign;
}

PUMICE_HOST_DEVICE float float_of_order_key(uint32_t key) {
  constexpr uint32_t kSign = 0x80000000u;
  return float_of_bits((key & kSign) != 0 ? key & ~kSign : ~key);
}

}  // namespace pumice
