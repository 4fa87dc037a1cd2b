// kernel: attention_merge
// kernel: attention_mask_pack
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/attention_forward.h"
#include "cpu/element.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

void merge_row(const AttentionMerge& job, int64_t i, int64_t head) {
  const float* lses = job.lses + head * job.lses_head_stride + i;
  const float sink = job.sinks != nullptr ? job.sinks[head] : -kInfinity;
  float greatest = sink;
  for (int64_t p = 0; p < job.parts; ++p) {
    greatest = std::max(greatest, lses[p * job.lses_part_stride]);
  }
  const int64_t at = (i * job.heads + head) * job.dim;
  float& lse = job.lse[head * job.lse_head_stride + i];
  // Every part empty: no weights, and no reference to take them from. (A NaN is not empty.)
  float total = greatest == -kInfinity ? 0.0f : std::exp(sink - greatest);
  const float reference = greatest == -kInfinity ? 0.0f : greatest;
  for (int64_t p = 0; p < job.parts; ++p) {
    total += std::exp(lses[p * job.lses_part_stride] - reference);
  }
  lse = total == 0.0f ? -kInfinity : reference + std::log(total);
  constexpr int64_t kPiece = 256;
  float sums[kPiece], part[kPiece];
  for (int64_t begin = 0; begin < job.dim; begin += kPiece) {
    const int64_t count = std::min(kPiece, job.dim - begin);
    std::fill_n(sums, count, 0.0f);
    for (int64_t p = 0; p < job.parts; ++p) {
      const float part_lse = lses[p * job.lses_part_stride];
      if (part_lse == -kInfinity) continue;  // whatever it holds
      const float weight = std::exp(part_lse - reference) / total;
      load_elements(job.outs, job.outs_dtype, p * job.outs_part_stride + at + begin, count, part);
      for (int64_t d = 0; d < count; ++d) sums[d] += weight * part[d];
    }
    for (int64_t d = 0; d < count; ++d)
      store_element(job.out, job.out_dtype, at + begin + d, sums[d]);
  }
}

void merge(const AttentionMerge& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) merge_row(job, row / job.heads, row % job.heads);
}

// Key 32·word + b of a row of the mask becomes bit b.
uint32_t pack_word(const uint8_t* row, int64_t count) {
  uint32_t bits = 0;
  for (int64_t b = 0; b < count; ++b) bits |= static_cast<uint32_t>(row[b] != 0) << b;
  return bits;
}

void pack_mask(const AttentionMaskPack& job, int64_t begin, int64_t end) {
  const int64_t bands = (job.q_len + kMaskBlock - 1) / kMaskBlock, words = (job.k_len + 31) / 32;
  const int64_t squares = (job.k_len + kMaskBlock - 1) / kMaskBlock;
  for (int64_t band = begin; band < end; ++band) {
    const int64_t first = band % bands * kMaskBlock, matrix = band / bands;
    const int64_t last = std::min<int64_t>(first + kMaskBlock, job.q_len);
    uint8_t* blocks = job.blocks + band * squares;
    for (int64_t n = 0; n < squares; ++n) {
      const int64_t keys = std::min<int64_t>(kMaskBlock, job.k_len - n * kMaskBlock);
      int64_t visible = 0;
      for (int64_t i = first; i < last; ++i) {
        const int64_t row = matrix * job.q_len + i;
        for (int64_t at = 0; at < keys; at += 32) {
          const int64_t j = n * kMaskBlock + at;
          const uint32_t bits =
              pack_word(job.mask + row * job.k_len + j, std::min<int64_t>(32, keys - at));
          job.bits[row * words + j / 32] = bits;
          visible += __builtin_popcount(bits);
        }
      }
      blocks[n] = visible == 0                       ? kMaskNone
                  : visible == (last - first) * keys ? kMaskAll
                                                     : kMaskSome;
    }
  }
}

}  // namespace

const AttentionMergeKernels attention_merge_kernels = {merge, pack_mask};

}  // namespace pumice::cpu::PUMICE_ISA
