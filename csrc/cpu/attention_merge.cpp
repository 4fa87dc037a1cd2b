// kernel: attention_merge
// kernel: attention_mask_pack
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/attention_dots.h"
#include "cpu/attention_exp.h"
#include "cpu/attention_forward.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Parts, and columns, at a time.
constexpr int64_t kParts = 64;
constexpr int64_t kPiece = 256;

// The parts of a row that saw a key, and what they weigh.
struct WeightedParts {
  int64_t count = 0;
  float weights[kParts];
  const void *rows[kParts], *next[kParts];

  // weights become 2^((lse - reference) / ln 2). Returns their sum.
  float weigh(float reference) {
    std::fill(weights + count, weights + (count + kLanes - 1) / kLanes * kLanes, -kInfinity);
    Vec total = zero();
    for (int64_t p = 0; p < count; p += kLanes) {
      const Vec difference = subtract(load(weights + p), broadcast(reference));
      const Vec weight = exp2(multiply(difference, broadcast(kLog2E)));
      store(weights + p, weight);
      total = add(total, weight);
    }
    return sum(total);
  }
};

// sums[d] += Σ_p weights[p] · rows[p][d]
template <class Stored>
void add_parts(const WeightedParts& parts, int64_t columns, float* sums) {
  const RowTable<Stored> rows{parts.rows, parts.next};
  const int64_t whole = columns / kLanes * kLanes;
  add_products(LeftOperand{parts.weights, 0}, rows, {sums, whole}, 1, whole, parts.count);
  for (int64_t p = 0; whole < columns && p < parts.count; ++p) {
    typename Stored::Element last[kLanes] = {};
    std::copy(rows.row(p) + whole, rows.row(p) + columns, last);
    store(sums + whole, fma(broadcast(parts.weights[p]), Stored::load(last), load(sums + whole)));
  }
}

void merge_row(const AttentionMerge& job, int64_t i, int64_t head) {
  const float* lses = job.lses + head * job.lses_head_stride + i;
  const float sink = job.sinks != nullptr ? job.sinks[head] : -kInfinity;
  float greatest = sink;
  for (int64_t p = 0; p < job.parts; ++p) {
    greatest = std::max(greatest, lses[p * job.lses_part_stride]);
  }
  // Every part empty: no weights, and no reference to take them from. (A NaN is not empty.)
  const float reference = greatest == -kInfinity ? 0.0f : greatest;
  const float sink_weight = greatest == -kInfinity ? 0.0f : std::exp(sink - greatest);
  const int64_t at = (i * job.heads + head) * job.dim, size = size_of(job.outs_dtype);
  float total = sink_weight;
  int64_t begin = 0;
  do {
    const int64_t columns = std::min(kPiece, job.dim - begin);
    float sums[kPiece];
    for (int64_t d = 0; d < columns; d += kLanes) store(sums + d, zero());
    total = sink_weight;
    for (int64_t p = 0; p < job.parts;) {
      WeightedParts parts;
      for (; p < job.parts && parts.count < kParts; ++p) {
        const float lse = lses[p * job.lses_part_stride];
        if (lse == -kInfinity) continue;  // whatever it holds
        const char* row =
            static_cast<const char*>(job.outs) + (p * job.outs_part_stride + at + begin) * size;
        parts.weights[parts.count] = lse;
        parts.rows[parts.count] = row;
        parts.next[parts.count++] = row + job.dim * size;
      }
      total += parts.weigh(reference);
      with_stored(CacheType::kQuery, job.outs_dtype,
                  [&](auto type) { add_parts<decltype(type)>(parts, columns, sums); });
    }
    const float factor = total == 0.0f ? 0.0f : 1.0f / total;
    for (int64_t d = 0; d < columns; d += kLanes) {
      store(sums + d, multiply(load(sums + d), broadcast(factor)));
    }
    store_elements(job.out, job.out_dtype, at + begin, columns, sums);
    begin += kPiece;
  } while (begin < job.dim);
  job.lse[head * job.lse_head_stride + i] =
      total == 0.0f ? -kInfinity : reference + std::log(total);
}

void merge(const AttentionMerge& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) merge_row(job, row / job.heads, row % job.heads);
}

// Key 32·word + b of a row of the mask becomes bit b.
uint32_t pack_word(const uint8_t* row, int64_t count) {
#if defined(__AVX2__)
  if (count == 32) {
    const __m256i keys = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
    const __m256i hidden = _mm256_cmpeq_epi8(keys, _mm256_setzero_si256());
    return ~static_cast<uint32_t>(_mm256_movemask_epi8(hidden));
  }
#endif
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
