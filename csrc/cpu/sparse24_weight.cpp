// kernel: sparse24_weight
//
// Whole 2:4 weights, compressed, gathered and decompressed: one pass, bound by memory.
#include <algorithm>
#include <cstring>

#include "cpu/sparse24_expand.h"
#include "cpu/sparse24_kernels.h"

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

// Hardware prefetchers stop at the end of a page: a row is fetched into L2 while the rows before it
// are written. Always inline: GCC takes a function of prefetches alone
// for one without effects, and drops the call.
constexpr int64_t kAhead = 2;  // rows

inline __attribute__((always_inline)) void fetch(const void* row, int64_t bytes, int64_t ahead) {
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(static_cast<const char*>(row) + ahead + i, 0, 2);
  }
}

template <typename T>
void decompress_row(const T* values, const uint8_t* meta, int64_t k, T* w) {
  const int64_t groups = k / kSparse24Group;
  int64_t g = expand_groups<sizeof(T)>(reinterpret_cast<const uint8_t*>(values), meta, groups,
                                       reinterpret_cast<uint8_t*>(w));
  for (; g < groups; ++g) {
    const uint32_t nibble = meta[g / 2] >> (4 * (g % 2));
    T four[4] = {};
    four[nibble & 3] = values[2 * g];
    four[nibble >> 2 & 3] = values[2 * g + 1];
    std::memcpy(w + 4 * g, four, sizeof(four));
  }
}

void decompress_rows(const void* values, const uint8_t* meta, int64_t element, int64_t k, void* w,
                     int64_t begin, int64_t end) {
  with_element(element, [&]<typename T>() {
    const int64_t bytes = k / 2 * int64_t{sizeof(T)}, meta_bytes = sparse24_meta_bytes(k);
    for (int64_t n = begin; n < end; ++n) {
      const T* row = static_cast<const T*>(values) + n * k / 2;
      const uint8_t* places = meta + n * meta_bytes;
      if (n + kAhead < end) {
        fetch(row, bytes, kAhead * bytes);
        fetch(places, meta_bytes, kAhead * meta_bytes);
      }
      decompress_row(row, places, k, static_cast<T*>(w) + (n - begin) * k);
    }
  });
}

}  // namespace

const Sparse24WeightKernels sparse24_weight_kernels = {compress_rows, gather_rows, decompress_rows};

}  // namespace pumice::cpu::PUMICE_ISA
