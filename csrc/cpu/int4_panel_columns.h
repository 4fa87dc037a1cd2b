// kPanel columns of y as the panels of int4 products see them: the parameters of their weight rows,
// a group a register, and where sums begin and end.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/element.h"
#include "cpu/int4_panel.h"

#if defined(__AVX2__)

namespace pumice::cpu::PUMICE_ISA {
namespace {

// lanes[g] = group g of the rows of a [N, G] matrix from `begin` on; past the end the last one
// again. load(at, count) gives elements [at, at + count) of it, at most kPanel.
template <typename Load>
inline void load_groups(const IntnWeight& weight, int64_t begin, const Load& load, Lanes* lanes) {
  for (int64_t group = 0; group < weight.groups; group += kPanel) {
    const int64_t count = std::min<int64_t>(kPanel, weight.groups - group);
    Lanes square[kPanel];
    for (int i = 0; i < kPanel; ++i) {
      const int64_t n = std::min<int64_t>(begin + i, weight.n - 1);
      square[i] = load(n * weight.groups + group, count);
    }
    transpose_floats(square);
    std::copy_n(square, count, lanes + group);
  }
}

inline void load_scales(const IntnWeight& weight, int64_t begin, Lanes* scales) {
  load_groups(
      weight, begin,
      [&](int64_t at, int64_t count) {
        return load_floats(weight.scales, weight.scale_dtype, at, count);
      },
      scales);
}

inline void load_zeros(const IntnWeight& weight, int64_t begin, Lanes* zeros) {
  if (weight.zero_kind == ZeroKind::kMiddle) {
    std::fill_n(zeros, weight.groups, broadcast(IntnLayout<4>::kMiddle));
  } else if (weight.zero_kind == ZeroKind::kInteger) {
    const uint8_t* bytes = static_cast<const uint8_t*>(weight.zeros);
    load_groups(
        weight, begin, [&](int64_t at, int64_t count) { return load_bytes(bytes + at, count); },
        zeros);
  } else {
    load_groups(
        weight, begin,
        [&](int64_t at, int64_t count) {
          return load_floats(weight.zeros, weight.scale_dtype, at, count);
        },
        zeros);
  }
}

// data[offset + i · stride] for the `count` columns that exist.
inline Lanes load_column(const void* data, DType dtype, int64_t offset, int64_t stride, int count) {
  alignas(64) float column[kPanel] = {};
  for (int i = 0; i < count; ++i) column[i] = load_element(data, dtype, offset + i * stride);
  Lanes lanes;
  std::memcpy(&lanes, column, sizeof(lanes));
  return lanes;
}

inline Lanes load_bias(const VectorView& bias, int64_t begin, int count) {
  return bias.data ? load_column(bias.data, bias.dtype, begin, 1, count) : broadcast(0.0f);
}

// y[at, at + count) = the first `count` sums
inline void store_columns(void* y, DType dtype, int64_t at, int count, Lanes sums) {
  alignas(64) float values[kPanel];
  std::memcpy(values, &sums, sizeof(values));
  for (int i = 0; i < count; i += 4) {
    Float4 four;
    std::memcpy(&four, values + i, sizeof(four));
    store_four(y, dtype, at + i, std::min(4, count - i), four);
  }
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA

#endif
