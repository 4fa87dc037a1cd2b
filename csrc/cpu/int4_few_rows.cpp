// kernel: int4_few_rows
//
// y = x · W^T + extra · extra_weight^T + bias for 4-bit weights and few rows of x: dot products
// along K. A register holds 128 (AVX-512) or 64 (AVX2) weights as they lie in memory, three
// instructions make bytes of them, and each 32-bit lane sums the products of one word, whose eight
// weights have one scale.
//
// Floor: the bytes of the weight, N·K/2 + N·G·(scale and zero), over the bandwidth of memory. For
// 4096² g128 with bf16 scales that is 8.65 MB. A Zen 4 core that copied at 17 … 20 GB/s beside busy
// neighbours took 0.45 ms with int8 activations (19 GB/s, at the floor) and 0.50 ms with bf16
// (17 GB/s). In caches a block of 128 weights takes 10 and 12 cycles, where it would take 12 and 14
// at that bandwidth.
#include <algorithm>
#include <cstring>

#include "cpu/int4_activations.h"
#include "cpu/int4_dots.h"
#include "cpu/int4_kernels.h"
#if defined(__AVX512VNNI__)
#include "cpu/int4_words_avx512vnni.h"
#elif defined(__AVX2__)
#include "cpu/int4_words_avx2.h"
#endif

namespace pumice::cpu::PUMICE_ISA {

#if defined(__AVX2__)

namespace {

// Rows of x and of the weight that are multiplied at a time.
constexpr int kTileM = 4;
constexpr int kTileN = 4;

// Weight rows between those that are multiplied and those that are fetched.
constexpr int64_t kAhead = 16;

// kTileN columns of y. Segments have room for a register read from any of them.
struct ColumnTile {
  int64_t begin;
  int count;                     // of columns that exist
  const uint32_t* rows[kTileN];  // past the end the last one again
  int64_t ahead;                 // words from a row to the one that is fetched
  int64_t stride;                // between rows of the following
  float* scales;                 // [kTileN] of each segment
  float* zeros;                  // [kTileN] scale · zero point of each segment
  float* products;               // [kTileM, kTileN] scale · scale of the activations
  float* extra;                  // [kTileN] rows of the dense terms
  float* groups;                 // of one row, before they are spread over segments
};

int64_t segment_stride(const Int4DigitJob& job) { return job.segment_count() + kWords; }

int64_t scratch(const Int4DigitJob& job) {
  const int64_t segments = segment_stride(job) * (2 * kTileN + kTileM * kTileN);
  return segments + kTileN * job.epilogue.extras() + job.weight.groups;
}

// out[s] = groups[group of segment s]
void spread(const Int4DigitJob& job, const float* groups, float* out) {
  const int64_t count = job.segment_count();
  if (count == job.weight.groups) {  // one segment each
    std::copy_n(groups, count, out);
  } else {
    for (int64_t s = 0; s < count; ++s) out[s] = groups[job.segments[s].group];
  }
}

void load_parameters(const Int4DigitJob& job, ColumnTile& tile) {
  const IntnWeight& weight = job.weight;
  for (int j = 0; j < kTileN; ++j) {
    const int64_t n = std::min(tile.begin + j, weight.n - 1), at = n * weight.groups;
    float* scales = tile.scales + j * tile.stride;
    float* zeros = tile.zeros + j * tile.stride;
    load_elements(weight.scales, weight.scale_dtype, at, weight.groups, tile.groups);
    spread(job, tile.groups, scales);
    if (weight.zero_kind == ZeroKind::kMiddle) {
      std::fill_n(zeros, job.segment_count(), static_cast<float>(IntnLayout<4>::kMiddle));
    } else {
      if (weight.zero_kind == ZeroKind::kFloat) {
        load_elements(weight.zeros, weight.scale_dtype, at, weight.groups, tile.groups);
      } else {
        const uint8_t* bytes = static_cast<const uint8_t*>(weight.zeros) + at;
        for (int64_t g = 0; g < weight.groups; ++g) tile.groups[g] = bytes[g];
      }
      spread(job, tile.groups, zeros);
    }
    for (int64_t s = 0; s < job.segment_count(); ++s) zeros[s] *= scales[s];
    std::fill_n(zeros + job.segment_count(), kWords, 0.0f);
    load_extra(job.epilogue, n, tile.extra + j * job.epilogue.extras());
  }
}

// sums[i][j] = Σ over blocks of (q of row j) · (x of row m + i) · their scales. With kOneScale no
// block has more than one segment.
template <int kM, int kPlanes, bool kOneScale>
void multiply_words(const Int4DigitJob& job, int64_t m, const ColumnTile& tile,
                    float (&sums)[kM][kTileN]) {
  constexpr int kTerms = (kPlanes + 1) / 2;
  constexpr int kDigits = kPlanes / kTerms;  // of a term
  constexpr int64_t kTermDigits = kDigits * 2 * kBlockWords;
  const int64_t words = intn_words(job.weight.k, 4);
  const int64_t row_digits = job.digits_per_row();
  Lanes acc[kM][kTileN];
#pragma GCC unroll 4
  for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kTileN; ++j) acc[i][j] = broadcast(0.0f);
  }
  // Σ (q - zero)·x = Σ q·x - zero·Σ x, here the second sum.
  const float* sums_of_x = job.statistics + m * job.statistics_per_row() + job.segment_count();
  for (int64_t s = 0; s < job.segment_count(); s += kWords) {
#pragma GCC unroll 4
    for (int i = 0; i < kM; ++i) {
      const Lanes x = load_lanes(sums_of_x + i * job.statistics_per_row() + s);
#pragma GCC unroll 4
      for (int j = 0; j < kTileN; ++j) {
        const Lanes zeros = load_lanes(tile.zeros + j * tile.stride + s);
        acc[i][j] = negative_multiply_add(zeros, x, acc[i][j]);
      }
    }
  }
  const auto step = [&](int64_t block, int64_t half, auto load) __attribute__((always_inline)) {
    const int64_t word = block * kBlockWords + half;
    const int32_t* digits = job.digits + m * row_digits + block * kTerms * kTermDigits + half;
    const int32_t* of_word = job.word_segments + word;
    const float* scales = tile.products + job.block_segments[block];
    Nibbles w[kTileN];
#pragma GCC unroll 4
    for (int j = 0; j < kTileN; ++j) w[j] = load(tile.rows[j] + word);
#pragma GCC unroll 4
    for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kTileN; ++j) {
        const int32_t* x = digits + i * row_digits;
        Lanes sum = to_float(dot_words<kDigits>(w[j], x));
        if constexpr (kTerms == 2) {
          const Lanes low = to_float(dot_words<kDigits>(w[j], x + kTermDigits));
          sum = multiply_add(low, broadcast(0x1p-16f), sum);
        }
        const float* scale = scales + (i * kTileN + j) * tile.stride;
        const Lanes lanes = kOneScale ? broadcast(*scale) : choose(scale, of_word);
        acc[i][j] = multiply_add(sum, lanes, acc[i][j]);
      }
    }
  };
  const int64_t whole = words / kBlockWords;
  for (int64_t block = 0; block < whole; ++block) {
#pragma GCC unroll 4
    for (int j = 0; j < kTileN; ++j) {
      const uint32_t* next = tile.rows[j] + tile.ahead + block * kBlockWords;
      _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
    }
#pragma GCC unroll 2
    for (int64_t half = 0; half < kBlockWords; half += kWords) {
      step(block, half, [](const uint32_t* p) { return load_words(p); });
    }
  }
  for (int64_t word = whole * kBlockWords; word < words; word += kWords) {
    const int64_t count = std::min<int64_t>(kWords, words - word);
    step(whole, word - whole * kBlockWords,
         [count](const uint32_t* p) { return load_words(p, count); });
  }
#pragma GCC unroll 4
  for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kTileN; ++j) sums[i][j] = sum_of(acc[i][j]);
  }
}

template <int kM>
void multiply_tile(const Int4DigitJob& job, int64_t m, const ColumnTile& tile) {
  const int64_t segments = job.segment_count(), stride = job.statistics_per_row();
  const float* statistics = job.statistics + m * stride;  // scales, then sums
  for (int i = 0; i < kM; ++i) {
    for (int j = 0; j < kTileN; ++j) {
      const float* weight_scales = tile.scales + j * tile.stride;
      float* products = tile.products + (i * kTileN + j) * tile.stride;
      for (int64_t s = 0; s < segments; ++s) {
        products[s] = weight_scales[s] * statistics[i * stride + s];
      }
    }
  }
  const int64_t extras = job.epilogue.extras();
  float sums[kM][kTileN], dense[kM][kTileN] = {};
  if (extras > 0) {
    add_dots<kM, kTileN>(job.epilogue.extra + m * extras, extras, tile.extra, extras, extras,
                         dense);
  }
  with_planes(job.planes, [&]<int kPlanes>() {
    if (job.segment_count() == job.blocks) {
      multiply_words<kM, kPlanes, true>(job, m, tile, sums);
    } else {
      multiply_words<kM, kPlanes, false>(job, m, tile, sums);
    }
  });
  const Float4 bias = load_bias(job.epilogue, tile.begin, tile.count);
  for (int i = 0; i < kM; ++i) {
    Float4 y, terms;
    std::memcpy(&y, sums[i], sizeof(y));
    std::memcpy(&terms, dense[i], sizeof(terms));
    store_four(job.epilogue.y, job.epilogue.y_dtype, (m + i) * job.epilogue.y_stride + tile.begin,
               tile.count, y + terms + bias);
  }
}

void gemm(const Int4DigitJob& job, float* memory, int64_t m_begin, int64_t m_end, int64_t n_begin,
          int64_t n_end) {
  const IntnWeight& weight = job.weight;
  const int64_t words = intn_words(weight.k, 4);
  ColumnTile tile;
  tile.stride = segment_stride(job);
  tile.scales = memory;
  tile.zeros = tile.scales + kTileN * tile.stride;
  tile.products = tile.zeros + kTileN * tile.stride;
  tile.extra = tile.products + kTileM * kTileN * tile.stride;
  tile.groups = tile.extra + kTileN * job.epilogue.extras();
  for (tile.begin = n_begin; tile.begin < n_end; tile.begin += kTileN) {
    tile.count = static_cast<int>(std::min<int64_t>(kTileN, n_end - tile.begin));
    for (int j = 0; j < kTileN; ++j) {
      tile.rows[j] = weight.qweight + std::min<int64_t>(tile.begin + j, weight.n - 1) * words;
    }
    // Hardware prefetchers stop at the end of a page: rows to come are fetched by hand, into L2
    // (into L1 the prefetches fill its miss buffers, and cost twice the time). At the end there are
    // none.
    tile.ahead = tile.begin + kAhead + kTileN <= weight.n ? kAhead * words : 0;
    load_parameters(job, tile);
    int64_t m = m_begin;
    const auto tiles = [&]<int kM>() {
      for (; m + kM <= m_end; m += kM) multiply_tile<kM>(job, m, tile);
    };
    tiles.template operator()<4>();
    tiles.template operator()<2>();
    tiles.template operator()<1>();
  }
}

constexpr DigitStrides kStrides{2 * kBlockWords, 1, kBlockWords};

void prepare(const Int4DigitJob& job, float* values, int64_t begin, int64_t end) {
  with_planes(job.planes, [&]<int kPlanes>() {
    for (int64_t m = begin; m < end; ++m) {
      float* statistics = job.statistics + m * job.statistics_per_row();
      float* sums_of = statistics + job.segment_count();
      std::fill_n(sums_of + job.segment_count(), kStatisticsPad, 0.0f);
      const auto store = [&](int64_t segment, float scale, const TermSums& sums) {
        statistics[segment] = scale;
        sums_of[segment] = scale * (sums.high + 0x1p-16f * sums.low);
      };
      prepare_row<kPlanes>(job, m, values, kStrides, kPlanes * kStrides.plane,
                           job.digits + m * job.digits_per_row(), store);
    }
  });
}

}  // namespace

const Int4DigitKernels int4_few_kernels = {true, prepare, gemm, scratch};

#else

const Int4DigitKernels int4_few_kernels = {false, nullptr, nullptr, nullptr};

#endif

}  // namespace pumice::cpu::PUMICE_ISA
