// What the operators of packed weights share.
#pragma once

#include <algorithm>
#include <vector>

#include "common/intn_args.h"
#include "cpu/int4_kernels.h"
#include "cpu/workspace.h"

namespace pumice::cpu {

inline void check_zeros(const char* op, const IntnWeight& weight) {
  if (weight.zero_kind != ZeroKind::kInteger) return;
  const auto* zeros = static_cast<const uint8_t*>(weight.zeros);
  uint8_t greatest = 0;
  for (int64_t i = 0; i < weight.n * weight.groups; ++i) greatest = std::max(greatest, zeros[i]);
  PUMICE_CHECK(greatest < (1 << weight.bits), op, "zeros must be below 2^bits = ", 1 << weight.bits,
               ", but hold ", int{greatest});
}

// Rows [begin, begin + count) of a weight.
inline IntnWeight rows_from(IntnWeight weight, int64_t begin, int64_t count) {
  const int64_t groups = begin * weight.groups;
  weight.qweight += begin * intn_words(weight.k, weight.bits);
  weight.scales = static_cast<const char*>(weight.scales) + groups * size_of(weight.scale_dtype);
  if (weight.zeros) {
    const int64_t zero_bytes =
        weight.zero_kind == ZeroKind::kInteger ? 1 : size_of(weight.scale_dtype);
    weight.zeros = static_cast<const char*>(weight.zeros) + groups * zero_bytes;
  }
  weight.n = count;
  return weight;
}

// Where a row's blocks of activations and groups of weights end.
struct Segments {
  std::vector<int32_t> block_segments = {0};
  std::vector<int32_t> word_segments;
  std::vector<Int4Segment> segments;

  explicit Segments(const IntnWeight& weight) {
    const int64_t words = intn_words(weight.k, 4), group_words = (weight.group_size + 7) / 8;
    word_segments.resize(static_cast<size_t>(ceil_div(words, kBlockWords) * kBlockWords));
    for (int64_t begin = 0; begin < words;) {
      const int64_t block = begin / kBlockWords, group = begin / group_words;
      const int64_t end = std::min({words, (block + 1) * kBlockWords, (group + 1) * group_words});
      std::fill(word_segments.begin() + begin, word_segments.begin() + end,
                static_cast<int32_t>(segments.size()) - block_segments.back());
      segments.push_back({static_cast<int32_t>(begin - block * kBlockWords),
                          static_cast<int32_t>(end - block * kBlockWords),
                          static_cast<int32_t>(group)});
      if (end == words || end % kBlockWords == 0) {
        block_segments.push_back(static_cast<int32_t>(segments.size()));
      }
      begin = end;
    }
  }
};

// One byte for int8 activations, two for what fp16 and bf16 hold, four for fp32.
inline int planes_of(DType dtype, bool int8_activation) {
  if (int8_activation) return 1;
  return dtype == DType::kFloat32 ? 4 : 2;
}

// A product in digits as far as it does not depend on the weight's values: the segments of its rows
// and the activations. The caller sets digits and statistics, and what each call multiplies.
inline Int4DigitJob digit_job(const Segments& segments, const Int4Activations& x, int planes) {
  Int4DigitJob job{};
  job.x = x;
  job.planes = planes;
  job.blocks = static_cast<int64_t>(segments.block_segments.size()) - 1;
  job.block_segments = segments.block_segments.data();
  job.segments = segments.segments.data();
  job.word_segments = segments.word_segments.data();
  return job;
}

}  // namespace pumice::cpu
