// kernel: sparse24_int4_few_rows
//
// y = x · W^T + bias for packed 4-bit 2:4 weights and few rows of x, in integers: kept nibbles
// times the activations' digits (int4_activations.h), which are picked in a register.
//
// A packed word is eight kept weights of 16 columns, a chunk of x. Its zero point cannot be taken
// off with a sum over all of x, as dense kernels do: the sum over the picked digits is kept beside
// that of the products.
//
// Floor: the bytes of the weight over the bandwidth of memory, 3/4 of the dense weight's: N·K/4 of
// nibbles and N·K/8 of places. But picking costs instructions, most of them shuffles, that a dense
// kernel does without: 4096² g128, M = 1, bf16, one thread of a Zen 4 takes 0.6 ms (32 cycles for
// each 256 columns), the dense kernel 0.45 ms; AVX2 0.95 and 0.65 ms. What is gained on such a core
// is memory; time, where several of them share its bandwidth.
#include <algorithm>
#include <cstring>

#include "cpu/int4_activations.h"
#include "cpu/sparse24_chunks.h"
#include "cpu/sparse24_kernels.h"
#include "cpu/sparse24_tile.h"
#if defined(__AVX512VNNI__)
#include "cpu/sparse24_words_avx512vnni.h"
#elif defined(__AVX2__)
#include "cpu/sparse24_words_avx2.h"
#endif

namespace pumice::cpu::PUMICE_ISA {

#if defined(__AVX2__)

namespace {

constexpr int kTileN = 4;
constexpr int64_t kSources = 4;                       // registers of x of a step
constexpr int64_t kStep = kSources * kRegisterBytes;  // columns
// A 128-bit lane sums the products of so many columns: those of a half have one scale, for groups
// are multiples of it.
constexpr int64_t kLaneColumns = 64;
static_assert(kStep / (kWords / 4) == kLaneColumns && kLaneColumns / 2 == 2 * kGroupMultiple);
constexpr int64_t kScaleBlocks = kStep / kActivationBlock;  // of x in a step

int64_t steps_of(int64_t k) { return (k + kStep - 1) / kStep; }

int64_t digits_row(int64_t k, int planes) { return steps_of(k) * planes * kStep; }
int64_t scales_row(int64_t k) { return steps_of(k) * kWords; }

int64_t padded_groups(const Sparse24Int4Job& job) { return job.kept.groups + kWords; }

int64_t scratch(const Sparse24Int4Job& job) {
  const int64_t for_gemm = 2 * kTileN * padded_groups(job) + 3 * steps_of(job.k) * kWords;
  return std::max(for_gemm, steps_of(job.k) * kStep);
}

// Plane p of a step holds digit p of its columns, the most significant first.
template <int kPlanes>
void prepare_rows(const Sparse24Int4Job& job, float* row) {
  const int64_t steps = steps_of(job.k);
  std::fill(row + job.k, row + steps * kStep, 0.0f);
  int8_t* digits = job.digits;
  float* scales = job.scales;
  for (int64_t m = 0; m < job.m; ++m) {
    load_elements(job.x, job.dtype, m * job.k, job.k, row);
    for (int64_t step = 0; step < steps; ++step, digits += kPlanes * kStep, scales += kWords) {
      alignas(64) int8_t planes[kPlanes][kStep];
      for (int64_t block = 0; block < kScaleBlocks; ++block) {
        const float* x = row + step * kStep + block * kActivationBlock;
        const BlockScale scale = block_scale<kPlanes>(x);
        alignas(64) int32_t q[kActivationBlock];
        round_block(x, scale.inverse, q);
        for (int p = kPlanes - 1; p >= 0; --p) {
          for (int64_t i = 0; i < kActivationBlock; ++i) {
            const int8_t digit = static_cast<int8_t>(q[i]);
            planes[p][block * kActivationBlock + i] = digit;
            q[i] = (q[i] - digit) >> 8;
          }
        }
        constexpr int64_t kLanesOf = kWords / kScaleBlocks;
        std::fill_n(scales + block * kLanesOf, kLanesOf, scale.scale);
      }
      order_chunks<kRegisterBytes, kSources>(planes, kPlanes * kStep, digits);
    }
  }
}

void prepare(const Sparse24Int4Job& job, float* row) {
  with_planes(job.planes, [&]<int kPlanes>() { prepare_rows<kPlanes>(job, row); });
}

// Which group's scale a lane takes: window[step] is the first group of a step, and low and high are
// relative to it, for the low and the high words of the lanes.
struct LaneGroups {
  int32_t *window, *low, *high;  // [steps · kWords], of window every kWords-th

  LaneGroups(const Sparse24Int4Job& job, float* memory) {
    const int64_t count = steps_of(job.k) * kWords;
    window = reinterpret_cast<int32_t*>(memory);
    low = window + count;
    high = low + count;
    const int64_t group_size = 2 * job.kept.group_size, last = job.kept.groups - 1;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t step = i / kWords;
      const int64_t column = step * kStep + i % kWords / 4 * kLaneColumns;
      const int64_t first = std::min(step * kStep / group_size, last);
      window[i] = static_cast<int32_t>(first);
      low[i] = static_cast<int32_t>(std::min(column / group_size, last) - first);
      high[i] =
          static_cast<int32_t>(std::min((column + kLaneColumns / 2) / group_size, last) - first);
    }
  }
};

// What kTileN weight rows are multiplied with in the end, in fp32.
struct Parameters {
  float* scales;  // [kTileN, padded_groups]
  float* zeros;
  int64_t stride;
};

void load_parameters(const IntnWeight& kept, int64_t begin, int64_t end, Parameters& parameters) {
  for (int j = 0; j < kTileN; ++j) {
    const int64_t at = std::min(begin + j, end - 1) * kept.groups;
    float* zeros = parameters.zeros + j * parameters.stride;
    load_elements(kept.scales, kept.scale_dtype, at, kept.groups,
                  parameters.scales + j * parameters.stride);
    if (kept.zero_kind == ZeroKind::kMiddle) {
      std::fill_n(zeros, kept.groups, static_cast<float>(IntnLayout<4>::kMiddle));
    } else if (kept.zero_kind == ZeroKind::kFloat) {
      load_elements(kept.zeros, kept.scale_dtype, at, kept.groups, zeros);
    } else {
      const uint8_t* bytes = static_cast<const uint8_t*>(kept.zeros) + at;
      for (int64_t g = 0; g < kept.groups; ++g) zeros[g] = bytes[g];
    }
  }
}

// Of one term, two digits, Σ (q - zero) · x in each lane: both sums are exact.
template <typename Bytes>
Lanes term_of(const Bytes& bytes, const Bytes& ones, const Bytes& first, const Bytes& second,
              Lanes zero) {
  const Lanes products = to_float(dot_digits(bytes, first, second));
  return negative_multiply_add(zero, to_float(dot_digits(ones, first, second)), products);
}

// With kHalves the low and the high words of a lane have different scales; with kMiddle all zero
// points are the middle.
template <int kM, int kPlanes, bool kHalves, bool kMiddle>
void multiply(const Sparse24Int4Job& job, int64_t m, const Sparse24Rows<kTileN>& rows,
              const LaneGroups& groups, const Parameters& parameters, float (&sums)[kM][kTileN]) {
  static_assert(kPlanes == 2 || kPlanes == 4);
  const int64_t words = intn_words(job.kept.k, 4), steps = steps_of(job.k);
  const int64_t x_stride = digits_row(job.k, kPlanes);
  const int8_t* x = job.digits + m * x_stride;
  const float* x_scales = job.scales + m * scales_row(job.k);
  const WordBytes ones = {all_ones(), all_ones()};
  const Lanes middle = broadcast(static_cast<float>(IntnLayout<4>::kMiddle));
  Lanes acc[kM][kTileN];
#pragma GCC unroll 4
  for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kTileN; ++j) acc[i][j] = broadcast(0.0f);
  }
  const auto add_step = [&](int64_t step, auto load,
                            auto places_of) __attribute__((always_inline)) {
    const int32_t window = groups.window[step * kWords];
    const int32_t* low = groups.low + step * kWords;
    const int32_t* high = groups.high + step * kWords;
#pragma GCC unroll 4
    for (int j = 0; j < kTileN; ++j) {
      const uint32_t* row = reinterpret_cast<const uint32_t*>(rows.values[j]);
      const WordBytes w = load(row + step * kWords);
      const WordBytes places = places_of(rows.meta[j] + step * kWords * 2);
      const float* scales = parameters.scales + j * parameters.stride + window;
      const float* zeros = parameters.zeros + j * parameters.stride + window;
      const Lanes low_scale = choose(scales, low);
      const Lanes low_zero = kMiddle ? middle : choose(zeros, low);
      const Lanes high_scale = kHalves ? choose(scales, high) : low_scale;
      const Lanes high_zero = kHalves && !kMiddle ? choose(zeros, high) : low_zero;
#pragma GCC unroll 4
      for (int i = 0; i < kM; ++i) {
        const Lanes x_scale = load_lanes(x_scales + i * steps * kWords + step * kWords);
        const int8_t* digits = x + i * x_stride + step * kPlanes * kStep;
        // The second term counts 2^-16 as much.
        Lanes of_low = broadcast(0.0f), of_high = broadcast(0.0f);
#pragma GCC unroll 2
        for (int term = kPlanes / 2 - 1; term >= 0; --term) {
          const WordBytes first = pick(digits + 2 * term * kStep, places);
          const WordBytes second = pick(digits + (2 * term + 1) * kStep, places);
          const auto add = [&](Lanes& sum, Lanes value) __attribute__((always_inline)) {
            sum = term == kPlanes / 2 - 1 ? value : multiply_add(sum, broadcast(0x1p-16f), value);
          };
          if constexpr (kHalves) {
            add(of_low, term_of(w.low, ones.low, first.low, second.low, low_zero));
            add(of_high, term_of(w.high, ones.high, first.high, second.high, high_zero));
          } else {
            add(of_low, term_of(w, ones, first, second, low_zero));
          }
        }
        acc[i][j] = multiply_add(of_low, low_scale * x_scale, acc[i][j]);
        if constexpr (kHalves) {
          acc[i][j] = multiply_add(of_high, high_scale * x_scale, acc[i][j]);
        }
      }
    }
  };
  int64_t step = 0;
  for (; (step + 1) * kWords <= words; ++step) {
    rows.prefetch(step * kWords * 4, step * kWords * 2);
    add_step(
        step, [](const uint32_t* row) { return kept_bytes(row); },
        [](const uint8_t* meta) { return word_places(meta); });
  }
  if (step < steps) {
    const int64_t count = words - step * kWords;
    add_step(
        step, [count](const uint32_t* row) { return kept_bytes(row, count); },
        [count](const uint8_t* meta) { return word_places(meta, count); });
  }
#pragma GCC unroll 4
  for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kTileN; ++j) sums[i][j] = sum_of(acc[i][j]);
  }
}

template <int kPlanes, bool kHalves, bool kMiddle>
void multiply_columns(const Sparse24Int4Job& job, float* memory, int64_t begin, int64_t end) {
  Parameters parameters;
  parameters.stride = padded_groups(job);
  parameters.scales = memory;
  parameters.zeros = memory + kTileN * parameters.stride;
  std::fill_n(memory, 2 * kTileN * parameters.stride, 0.0f);
  const LaneGroups groups(job, memory + 2 * kTileN * parameters.stride);
  const int64_t row_bytes = intn_words(job.kept.k, 4) * 4;
  for (int64_t n = begin; n < end; n += kTileN) {
    const int count = static_cast<int>(std::min<int64_t>(kTileN, end - n));
    const Sparse24Rows<kTileN> rows(job.kept.qweight, row_bytes, job.meta, job.k, job.kept.n, n,
                                    end);
    load_parameters(job.kept, n, end, parameters);
    const Float4 bias = load_four(job.bias, n, count);
    int64_t m = 0;
    const auto tiles = [&]<int kM>() {
      for (; m + kM <= job.m; m += kM) {
        float sums[kM][kTileN];
        multiply<kM, kPlanes, kHalves, kMiddle>(job, m, rows, groups, parameters, sums);
        for (int i = 0; i < kM; ++i) {
          Float4 y;
          std::memcpy(&y, sums[i], sizeof(y));
          store_four(job.y, job.dtype, (m + i) * job.kept.n + n, count, y + bias);
        }
      }
    };
    tiles.template operator()<2>();
    tiles.template operator()<1>();
  }
}

void gemm(const Sparse24Int4Job& job, float* memory, int64_t begin, int64_t end) {
  const bool halves = job.kept.groups > 1 && 2 * job.kept.group_size % kLaneColumns != 0;
  const auto with_zeros = [&]<int kPlanes, bool kHalves>() {
    if (job.kept.zero_kind == ZeroKind::kMiddle) {
      multiply_columns<kPlanes, kHalves, true>(job, memory, begin, end);
    } else {
      multiply_columns<kPlanes, kHalves, false>(job, memory, begin, end);
    }
  };
  if (job.planes == 4) {
    halves ? with_zeros.template operator()<4, true>() : with_zeros.template operator()<4, false>();
  } else {
    halves ? with_zeros.template operator()<2, true>() : with_zeros.template operator()<2, false>();
  }
}

}  // namespace

const Sparse24Int4Kernels sparse24_int4_kernels = {4,       digits_row, scales_row,
                                                   scratch, prepare,    gemm};

#else

const Sparse24Int4Kernels sparse24_int4_kernels = {0, nullptr, nullptr, nullptr, nullptr, nullptr};

#endif

}  // namespace pumice::cpu::PUMICE_ISA
