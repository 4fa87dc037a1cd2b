// kernel: sparse24_weight
//
// Whole 2:4 weights, compressed, gathered and decompressed: one pass, bound by memory. A group of
// four elements is a word of four times their size, into which a kept one is shifted.
#include <algorithm>
#include <cstring>

#include "cpu/int4_dequantize.h"
#include "cpu/sparse24_kernels.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace pumice::cpu::PUMICE_ISA {
namespace {

// f.template operator()<T>(), T an unsigned integer of `element` bytes.
template <typename F>
auto with_element(int64_t element, const F& f) {
  if (element == 1) return f.template operator()<uint8_t>();
  if (element == 2) return f.template operator()<uint16_t>();
  return f.template operator()<uint32_t>();
}

// The nibble of four elements; the bits in `magnitude` say whether one is a nonzero, for -0.0 is
// none.
template <typename T>
uint8_t group_of(const T* four, T magnitude) {
  uint32_t mask = 0;
  for (int c = 0; c < 4; ++c) mask |= uint32_t{(four[c] & magnitude) != 0} << c;
  return sparse24_group(mask);
}

template <typename T>
int64_t compress(const T* w, T magnitude, int64_t k, T* values, uint8_t* meta, int64_t begin,
                 int64_t end, int64_t* group) {
  const int64_t groups = k / kSparse24Group, bytes = sparse24_meta_bytes(k);
  for (int64_t n = begin; n < end; ++n) {
    const T* row = w + n * k;
    T* kept = values + n * k / 2;
    uint8_t* places = meta + n * bytes;
    std::memset(places, kSparse24Filler << 4 | kSparse24Filler, static_cast<size_t>(bytes));
    for (int64_t g = 0; g < groups; ++g) {
      const T* four = row + g * kSparse24Group;
      const uint8_t nibble = group_of(four, magnitude);
      if (nibble == 0) {
        *group = g;
        return n;
      }
      kept[2 * g] = four[nibble & 3];
      kept[2 * g + 1] = four[nibble >> 2];
      uint8_t& byte = places[g / 2];
      byte = static_cast<uint8_t>(g % 2 ? (byte & 0x0f) | nibble << 4 : (byte & 0xf0) | nibble);
    }
  }
  return end;
}

int64_t compress_rows(const void* w, int64_t element, bool floating, int64_t k, void* values,
                      uint8_t* meta, int64_t begin, int64_t end, int64_t* group) {
  return with_element(element, [&]<typename T>() {
    const T sign = static_cast<T>(T{1} << (8 * sizeof(T) - 1));
    const T magnitude = static_cast<T>(floating ? ~sign : ~T{0});
    return compress(static_cast<const T*>(w), magnitude, k, static_cast<T*>(values), meta, begin,
                    end, group);
  });
}

void gather_rows(const void* w, const uint8_t* meta, int64_t element, int64_t k, void* values,
                 int64_t begin, int64_t end) {
  with_element(element, [&]<typename T>() {
    for (int64_t n = begin; n < end; ++n) {
      const T* row = static_cast<const T*>(w) + n * k;
      const uint8_t* places = meta + n * sparse24_meta_bytes(k);
      T* kept = static_cast<T*>(values) + n * k / 2;
      for (int64_t j = 0; j < k / 2; ++j) kept[j] = row[sparse24_column(places, j)];
    }
  });
}

// Eight groups at a time share a word of meta: a loop that compilers turn into vectors.
template <typename T, typename Pair, typename Four>
void decompress_row(const T* values, const uint8_t* meta, int64_t k, T* w) {
  static_assert(sizeof(Pair) == 2 * sizeof(T) && sizeof(Four) == 4 * sizeof(T));
  constexpr int kBits = 8 * sizeof(T);
  const int64_t groups = k / kSparse24Group;
  for (int64_t begin = 0; begin < groups; begin += 8) {
    uint32_t places;
    std::memcpy(&places, meta + begin / 2, sizeof(places));
    Pair pairs[8] = {};
    Four fours[8];
    const int64_t count = std::min<int64_t>(8, groups - begin);
    if (count == 8) {
      std::memcpy(pairs, values + 2 * begin, sizeof(pairs));
    } else {
      std::memcpy(pairs, values + 2 * begin, static_cast<size_t>(count) * sizeof(Pair));
    }
    for (int i = 0; i < 8; ++i) {
      const uint32_t nibble = places >> (4 * i);
      const Four first = static_cast<T>(pairs[i]), second = static_cast<T>(pairs[i] >> kBits);
      fours[i] = first << (kBits * (nibble & 3)) | second << (kBits * (nibble >> 2 & 3));
    }
    if (count == 8) {
      std::memcpy(w + 4 * begin, fours, sizeof(fours));
    } else {
      std::memcpy(w + 4 * begin, fours, static_cast<size_t>(count) * sizeof(Four));
    }
  }
}

#if defined(__AVX512F__)
// Of a byte of meta, the columns of its two groups as bits.
struct ColumnTable {
  uint8_t columns[256];
  constexpr ColumnTable() : columns() {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      columns[byte] = static_cast<uint8_t>((1u << (byte & 3) | 1u << (byte >> 2 & 3)) |
                                           (16u << (byte >> 4 & 3) | 16u << (byte >> 6)));
    }
  }
};
constexpr ColumnTable kTable;
#endif

// Elements of 4 bytes: a group is a register.
void decompress_row(const uint32_t* values, const uint8_t* meta, int64_t k, uint32_t* w) {
  const int64_t groups = k / kSparse24Group;
  int64_t g = 0;
#if defined(__AVX512F__)
  // vpexpandd writes the kept elements where a mask says.
  for (; g + 4 <= groups; g += 4) {
    const __mmask16 mask =
        static_cast<__mmask16>(kTable.columns[meta[g / 2]] | kTable.columns[meta[g / 2 + 1]] << 8);
    const __m256i kept = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 2 * g));
    _mm512_storeu_si512(w + 4 * g, _mm512_maskz_expand_epi32(mask, _mm512_castsi256_si512(kept)));
  }
#endif
  for (; g < groups; ++g) {
    const uint32_t nibble = meta[g / 2] >> (4 * (g % 2));
    uint32_t four[4] = {};
    four[nibble & 3] = values[2 * g];
    four[nibble >> 2 & 3] = values[2 * g + 1];
    std::memcpy(w + 4 * g, four, sizeof(four));
  }
}

void decompress_row(const uint16_t* values, const uint8_t* meta, int64_t k, uint16_t* w) {
  decompress_row<uint16_t, uint32_t, uint64_t>(values, meta, k, w);
}

void decompress_row(const uint8_t* values, const uint8_t* meta, int64_t k, uint8_t* w) {
  decompress_row<uint8_t, uint16_t, uint32_t>(values, meta, k, w);
}

void decompress_rows(const void* values, const uint8_t* meta, int64_t element, int64_t k, void* w,
                     int64_t begin, int64_t end) {
  with_element(element, [&]<typename T>() {
    for (int64_t n = begin; n < end; ++n) {
      decompress_row(static_cast<const T*>(values) + n * k / 2, meta + n * sparse24_meta_bytes(k),
                     k, static_cast<T*>(w) + (n - begin) * k);
    }
  });
}

// A byte of packed weights is a group: two kept nibbles, which become four of 16 bits.
void decompress_nibbles(const IntnWeight& kept, const uint8_t* meta, uint32_t* qweight,
                        int64_t begin, int64_t end) {
  const int64_t k = 2 * kept.k, groups = k / kSparse24Group;
  const int64_t in_words = intn_words(kept.k, 4), out_words = intn_words(k, 4);
  const int64_t group_quads = kept.group_size / 2;  // groups of four that share a zero point
  for (int64_t n = begin; n < end; ++n) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(kept.qweight + n * in_words);
    const uint8_t* places = meta + n * sparse24_meta_bytes(k);
    uint16_t* out = reinterpret_cast<uint16_t*>(qweight + (n - begin) * out_words);
    for (int64_t first = 0; first < groups; first += group_quads) {
      const int64_t last = std::min(first + group_quads, groups);
      const float zero_point = group_parameters(kept, n, first / group_quads).zero;
      const uint32_t zero = static_cast<uint32_t>(zero_point), zeros = zero * 0x1111u;
      const uint32_t flip = zero * 0x11u;
      for (int64_t g = first; g < last; ++g) {
        // What differs from the zero point is shifted into a word of zero points.
        const uint32_t nibble = places[g / 2] >> (4 * (g % 2)), pair = bytes[g] ^ flip;
        const uint32_t four = (pair & 15) << (4 * (nibble & 3)) | (pair >> 4)
                                                                      << (4 * (nibble >> 2 & 3));
        out[g] = static_cast<uint16_t>(four ^ zeros);
      }
    }
    if (groups % 2) out[groups] = 0;  // the last word is half full
  }
}

}  // namespace

const Sparse24WeightKernels sparse24_weight_kernels = {compress_rows, gather_rows, decompress_rows,
                                                       decompress_nibbles};

}  // namespace pumice::cpu::PUMICE_ISA
