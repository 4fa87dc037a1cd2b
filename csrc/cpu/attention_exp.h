// Exponentials and hyperbolic tangents of whole registers.
#pragma once

#include "cpu/attention_vector.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// 2^r - 1 on [-1/2, 1/2] as r·(c0 + r·(c1 + …)), fitted to the least relative error of 2^r,
// 2^-23.3; 2^0 is 1.
constexpr int kExp2Terms = 5;
constexpr float kExp2[kExp2Terms] = {0x1.62e42ap-1f, 0x1.ebf9bcp-3f, 0x1.c6b752p-5f, 0x1.3cea88p-7f,
                                     0x1.5bba14p-10f};

// 2^x with a relative error below 2^-22, for x ≤ 127; 0 below -126, where the result is no normal
// number, and NaN for NaN. x - n, n = round(x), is exact, and 2^x = 2^n · 2^(x - n).
PUMICE_VECTOR Vec exp2(Vec x) {
  const Vec least = broadcast(-126.0f);
  const Vec bounded = maximum(least, x);  // -∞ minus itself would be NaN
  const Vec n = round_to_integer(bounded);
  const Vec r = subtract(bounded, n);
  Vec y = broadcast(kExp2[kExp2Terms - 1]);
#pragma GCC unroll 8
  for (int i = kExp2Terms - 2; i >= 0; --i) y = fma(y, r, broadcast(kExp2[i]));
  y = fma(y, r, broadcast(1.0f));
  return select(less(x, least), zero(), times_power_of_two(y, n));
}

// tanh(x)/x - 1 on |x| ≤ 0.625 as z·(c0 + z·(c1 + …)), z = x², fitted as above, 2^-28.
constexpr int kTanhTerms = 5;
constexpr float kTanh[kTanhTerms] = {-0x1.555532p-2f, 0x1.110726p-3f, -0x1.b83c5ap-5f,
                                     0x1.52269cp-6f, -0x1.75e1ccp-8f};

// tanh(x) with a relative error below 2^-21; NaN for NaN. Near 0, where 1 - 2 / (e^2x + 1) would
// cancel, a polynomial.
PUMICE_VECTOR Vec tanh(Vec x) {
  const Vec size = magnitude(x), square = multiply(x, x);
  Vec small = broadcast(kTanh[kTanhTerms - 1]);
#pragma GCC unroll 8
  for (int i = kTanhTerms - 2; i >= 0; --i) small = fma(small, square, broadcast(kTanh[i]));
  small = fma(multiply(small, square), x, x);
  // Beyond 10 the result rounds to 1: the bound keeps e^2x finite. (NaN comes through.)
  const Vec bounded = minimum(broadcast(10.0f), size);
  const Vec power = exp2(multiply(bounded, broadcast(2.0f * kLog2E)));
  const Vec large = subtract(broadcast(1.0f), divide(broadcast(2.0f), add(power, broadcast(1.0f))));
  const Vec signed_large = select(less(x, zero()), subtract(zero(), large), large);
  return select(less(size, broadcast(0.625f)), small, signed_large);
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
