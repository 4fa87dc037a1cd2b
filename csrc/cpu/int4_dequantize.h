// W[n,k] = (q[n,k] - zero) · scale in fp32, of any width, group size and kind of zero point.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/intn_layout.h"
#include "cpu/element.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

struct GroupParameters {
  float scale, zero;
};

inline GroupParameters group_parameters(const IntnWeight& weight, int64_t n, int64_t group) {
  const int64_t i = n * weight.groups + group;
  const float scale = load_element(weight.scales, weight.scale_dtype, i);
  switch (weight.zero_kind) {
    case ZeroKind::kInteger:
      return {scale, static_cast<float>(static_cast<const uint8_t*>(weight.zeros)[i])};
    case ZeroKind::kFloat:
      return {scale, load_element(weight.zeros, weight.scale_dtype, i)};
    default:
      return {scale, static_cast<float>(1 << (weight.bits - 1))};
  }
}

inline const uint32_t* row_words(const IntnWeight& weight, int64_t n) {
  return weight.qweight + n * intn_words(weight.k, weight.bits);
}

// out[0, K) = W[n, :]
template <int kBits>
void dequantize_row(const IntnWeight& weight, int64_t n, float* out) {
  const uint32_t* words = row_words(weight, n);
  const auto value = [&](int64_t k, const GroupParameters& group) {
    return (static_cast<float>(intn_value<kBits>(words, k)) - group.zero) * group.scale;
  };
  if (weight.g_idx) {
    for (int64_t k = 0; k < weight.k; ++k) {
      out[k] = value(k, group_parameters(weight, n, weight.g_idx[k]));
    }
    return;
  }
  for (int64_t group = 0; group < weight.groups; ++group) {
    const GroupParameters parameters = group_parameters(weight, n, group);
    const int64_t begin = group * weight.group_size;
    const int64_t end = std::min(begin + weight.group_size, weight.k);
    for (int64_t k = begin; k < end; ++k) out[k] = value(k, parameters);
  }
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA
