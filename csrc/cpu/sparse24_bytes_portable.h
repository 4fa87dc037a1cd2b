// Sixteen kept bytes in plain C++.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/sparse24_layout.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr int kBytes = 16;
using IntLanes = int32_t;

struct Places {
  uint8_t column[kBytes];  // in the block
};

struct Values {
  int8_t bytes[kBytes];
};

inline uint8_t prepare_byte(int8_t q) { return static_cast<uint8_t>(q); }
inline IntLanes zero_lanes() { return 0; }

inline Places load_places(const uint8_t* meta, int64_t /*kept*/ = kBytes) {
  Places places;
  for (int j = 0; j < kBytes; ++j) {
    places.column[j] = static_cast<uint8_t>(sparse24_column(meta, j));
  }
  return places;
}

inline Values pick(const uint8_t* x, const Places& places) {
  Values picked;
  for (int j = 0; j < kBytes; ++j) picked.bytes[j] = static_cast<int8_t>(x[places.column[j]]);
  return picked;
}

inline Values load_values(const int8_t* values, int64_t count = kBytes) {
  Values all = {};
  std::memcpy(all.bytes, values, static_cast<size_t>(count));
  return all;
}

inline IntLanes add_products(IntLanes acc, const Values& picked, const Values& values) {
  for (int j = 0; j < kBytes; ++j) acc += int32_t{picked.bytes[j]} * values.bytes[j];
  return acc;
}

inline IntLanes add_correction(IntLanes acc, const Values& /*values*/) { return acc; }
inline int32_t exact_sum(IntLanes acc, IntLanes /*correction*/) { return acc; }

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
