// The exponentials and hyperbolic tangents of registers, against double: a program for
// test_attention_exp.py to run.
#include "cpu/attention_exp.h"

#include <bit>
#include <cmath>
#include <cstdio>
#include <limits>

namespace {

using namespace pumice::cpu::PUMICE_ISA;

float exp2_of(float x) {
  float lanes[kLanes];
  store(lanes, exp2(broadcast(x)));
  return lanes[kLanes - 1];
}

float tanh_of(float x) {
  float lanes[kLanes];
  store(lanes, tanh(broadcast(x)));
  return lanes[kLanes - 1];
}

int failures = 0;
void expect(bool holds, const char* what) {
  if (!holds) std::printf("%s does not hold\n", what);
  failures += !holds;
}

}  // namespace

int main() {
  const float infinity = std::numeric_limits<float>::infinity();
  double exp_error = 0, tanh_error = 0;
  // Every 9973rd float, of all signs and magnitudes; finely in between where it matters.
  const auto look = [&](float x) {
    if (x >= -126.0f && x <= 127.0f) {
      const double exact = std::exp2(static_cast<double>(x));
      exp_error = std::fmax(exp_error, std::fabs(exp2_of(x) - exact) / exact);
    }
    if (std::fabs(x) >= 0x1p-120f && std::fabs(x) < infinity) {
      const double exact = std::tanh(static_cast<double>(x));
      tanh_error = std::fmax(tanh_error, std::fabs((tanh_of(x) - exact) / exact));
    }
  };
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 9973) {
    look(std::bit_cast<float>(static_cast<uint32_t>(bits)));
  }
  for (float x = -12.0f; x < 12.0f; x += 0x1p-15f) look(x);
  std::printf("relative errors: exp2 2^%.2f, tanh 2^%.2f\n", std::log2(exp_error),
              std::log2(tanh_error));
  expect(exp_error < 0x1p-22, "exp2 within 2^-22");
  expect(tanh_error < 0x1p-21, "tanh within 2^-21");
  expect(exp2_of(0.0f) == 1.0f, "2^0 = 1");
  expect(exp2_of(-infinity) == 0.0f && exp2_of(-1e30f) == 0.0f && exp2_of(-126.5f) == 0.0f,
         "0 below the normal numbers");
  expect(std::isnan(exp2_of(std::nanf(""))) && std::isnan(tanh_of(std::nanf(""))), "NaN for NaN");
  expect(tanh_of(infinity) == 1.0f && tanh_of(-infinity) == -1.0f && tanh_of(0.0f) == 0.0f,
         "tanh at its ends and at 0");
  return failures != 0;
}
