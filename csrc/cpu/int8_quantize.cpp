// kernel: int8_quantize
//
// q = rint(x · 127/absmax), row by row: a row is read for its absolute maximum and, then in cache,
// read again and rounded. Rows go through a small buffer of floats, so that the loops are plain
// ones that the compiler vectorises for each instruction set.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <limits>

#include "common/int8_numerics.h"
#include "cpu/element.h"
#include "cpu/int8_kernels.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

constexpr int64_t kBlock = 512;  // 2 KB of floats: stays in L1 beside the row
constexpr int32_t kInfinityBits = 0x7f800000;

int32_t magnitude_bits(float x) { return std::bit_cast<int32_t>(x) & 0x7fffffff; }

// As an integer, so that NaN compares too: an outlier is what is_outlier() says.
int32_t threshold_bits(const Int8QuantizeJob& job) { return std::bit_cast<int32_t>(job.threshold); }

// `count` elements of x' from `begin` of a row on: in place where x is such already, else in
// buffer.
const float* load_block(const Int8QuantizeJob& job, int64_t row, int64_t begin, int64_t count,
                        float* buffer) {
  const int64_t start = row * job.k + begin;
  if (job.dtype == DType::kFloat32 && !job.smooth) return static_cast<const float*>(job.x) + start;
  load_elements(job.x, job.dtype, start, count, buffer);
  if (job.smooth) {
    const float* smooth = job.smooth + begin;
    for (int64_t i = 0; i < count; ++i) buffer[i] *= smooth[i];
  }
  return buffer;
}

// Columns are shared between the threads, which only ever set a flag; looking first keeps the cache
// line from bouncing between them.
void flag_column(uint8_t& outlier) {
  std::atomic_ref<uint8_t> flag(outlier);
  if (!flag.load(std::memory_order_relaxed)) flag.store(1, std::memory_order_relaxed);
}

// Outliers are few: a vectorised comparison, then eight columns at a glance.
void flag_outliers(const float* x, int64_t count, int32_t threshold, uint8_t* outliers) {
  uint8_t outlying[kBlock + 8];
  for (int64_t i = 0; i < count; ++i) outlying[i] = magnitude_bits(x[i]) >= threshold;
  std::memset(outlying + count, 0, 8);
  for (int64_t begin = 0; begin < count; begin += 8) {
    uint64_t any;
    std::memcpy(&any, outlying + begin, sizeof(any));
    if (!any) continue;
    for (int64_t i = begin; i < begin + 8; ++i) {
      if (outlying[i]) flag_column(outliers[i]);
    }
  }
}

int32_t row_absmax_bits(const Int8QuantizeJob& job, int64_t row) {
  float buffer[kBlock];
  int32_t absmax = 0;
  for (int64_t begin = 0; begin < job.k; begin += kBlock) {
    const int64_t count = std::min(kBlock, job.k - begin);
    const float* x = load_block(job, row, begin, count, buffer);
    if (!job.has_threshold) {
      for (int64_t i = 0; i < count; ++i) absmax = std::max(absmax, magnitude_bits(x[i]));
      continue;
    }
    const int32_t threshold = threshold_bits(job);
    int32_t largest = 0;  // outliers included: most blocks hold none
    for (int64_t i = 0; i < count; ++i) {
      const int32_t magnitude = magnitude_bits(x[i]);
      largest = std::max(largest, magnitude);
      absmax = std::max(absmax, magnitude < threshold ? magnitude : 0);
    }
    if (largest >= threshold) flag_outliers(x, count, threshold, job.outliers + begin);
  }
  return absmax;
}

// Adding 1.5·2^23 leaves no bit for a fraction: the addition rounds to nearest even, like
// int8_round(), and the integer lies in the low bits of the sum, here the low eight.
int8_t round_to_int8(float x) { return static_cast<int8_t>(std::bit_cast<int32_t>(x + 0x1.8p23f)); }

enum class Range { kWithin127, kAny };

template <Range range>
void round_row(const Int8QuantizeJob& job, int64_t row, float inverse_scale) {
  float buffer[kBlock];
  const int32_t threshold = job.has_threshold ? threshold_bits(job) : 0;
  for (int64_t begin = 0; begin < job.k; begin += kBlock) {
    const int64_t count = std::min(kBlock, job.k - begin);
    const float* x = load_block(job, row, begin, count, buffer);
    int8_t* q = job.q + row * job.k + begin;
    if (range == Range::kAny) {
      for (int64_t i = 0; i < count; ++i) {
        const float scaled = x[i] * inverse_scale;
        const float clamped = scaled > kInt8Max    ? kInt8Max
                              : scaled < -kInt8Max ? -kInt8Max
                                                   : scaled;
        q[i] = round_to_int8(scaled == scaled ? clamped : 0.0f);
      }
    } else if (job.has_threshold) {
      for (int64_t i = 0; i < count; ++i) {
        const float scaled = x[i] * inverse_scale;
        q[i] = round_to_int8(magnitude_bits(x[i]) < threshold ? scaled : 0.0f);
      }
    } else {
      for (int64_t i = 0; i < count; ++i) q[i] = round_to_int8(x[i] * inverse_scale);
    }
  }
}

void quantize_rows(const Int8QuantizeJob& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int32_t bits = row_absmax_bits(job, row);
    if (bits >= kInfinityBits) {
      job.scale[row] = std::numeric_limits<float>::quiet_NaN();
      std::memset(job.q + row * job.k, 0, static_cast<size_t>(job.k));
      continue;
    }
    const float absmax = std::bit_cast<float>(bits);
    job.scale[row] = int8_scale(absmax);
    round_row<Range::kWithin127>(job, row, int8_inverse_scale(absmax));
  }
}

int32_t absmax_bits(const Int8QuantizeJob& job, int64_t begin, int64_t end) {
  int32_t bits = 0;
  for (int64_t row = begin; row < end; ++row) bits = std::max(bits, row_absmax_bits(job, row));
  return bits;
}

void round_rows(const Int8QuantizeJob& job, float inverse_scale, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (job.has_threshold) {
      round_row<Range::kWithin127>(job, row, inverse_scale);
    } else {
      round_row<Range::kAny>(job, row, inverse_scale);
    }
  }
}

void residual_panels(const ResidualJob& job, int64_t begin, int64_t end) {
  const Int8QuantizeJob& quantized = job.quantized;
  for (int64_t panel = begin; panel < end; ++panel) {
    float* out = job.residual + panel * job.count * kPanelRows;
    for (int64_t i = 0; i < kPanelRows; ++i) {
      const int64_t row = panel * kPanelRows + i;
      for (int64_t j = 0; j < job.count; ++j) {
        float residual = 0.0f;
        if (row < job.m) {
          const int64_t at = row * quantized.k + job.columns[j];
          const float x = load_element(quantized.x, quantized.dtype, at);
          if (!job.per_element || is_outlier(x, quantized.threshold)) {
            const float kept = quantized.scale[row] * static_cast<float>(quantized.q[at]);
            residual = round_to(quantized.dtype, x - kept);
          }
        }
        out[j * kPanelRows + i] = residual;
      }
    }
  }
}

}  // namespace

const Int8QuantizeKernels int8_quantize_kernels = {quantize_rows, absmax_bits, round_rows,
                                                   residual_panels};

}  // namespace pumice::cpu::PUMICE_ISA
