// Four kept weights in plain C++.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/sparse24_layout.h"
#include "cpu/element.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr int kFloats = 4;
using Lanes = Float4;
using Places = const uint8_t*;

inline Lanes zero_lanes() { return Float4{}; }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return a * b + c; }
inline Places load_places(const uint8_t* meta) { return meta; }

inline Lanes pick(const float* x, Places places) {
  return Float4{x[sparse24_column(places, 0)], x[sparse24_column(places, 1)],
                x[sparse24_column(places, 2)], x[sparse24_column(places, 3)]};
}

template <DType kDtype>
inline Lanes load_values(const void* values, int64_t j, int64_t count = kFloats) {
  Float4 lanes = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = load_element(values, kDtype, j + i);
  return lanes;
}

inline float sum_of(Lanes x) { return (x[0] + x[1]) + (x[2] + x[3]); }

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
