// kernel: int4_weight
//
// Packing, unpacking and dequantization of whole weights: one pass, bound by memory.
#include <cstring>

#include "cpu/int4_dequantize.h"
#include "cpu/int4_kernels.h"

namespace pumice::cpu::PUMICE_ISA {
namespace {

bool pack_rows(const uint8_t* q, int64_t k, int bits, uint32_t* qweight, int64_t begin,
               int64_t end) {
  return with_intn_width(bits, [&]<int kBits>() {
    using Layout = IntnLayout<kBits>;
    const int64_t words = intn_words(k, kBits);
    uint32_t seen = 0;
    for (int64_t n = begin; n < end; ++n) {
      const uint8_t* row = q + n * k;
      for (int64_t i = 0; i < k; ++i) seen |= row[i];
      for (int64_t i = 0; i < words; ++i) qweight[n * words + i] = intn_word<kBits>(row, k, i);
    }
    return (seen & ~Layout::kMask) == 0;
  });
}

void unpack_rows(const uint32_t* qweight, int64_t k, int bits, uint8_t* q, int64_t begin,
                 int64_t end) {
  with_intn_width(bits, [&]<int kBits>() {
    const int64_t words = intn_words(k, kBits);
    for (int64_t n = begin; n < end; ++n) {
      unpack_values<kBits>(qweight + n * words, 0, k, q + n * k);
    }
  });
}

void dequantize_rows(const IntnWeight& weight, void* out, DType out_dtype, float* row,
                     int64_t begin, int64_t end) {
  with_intn_width(weight.bits, [&]<int kBits>() {
    for (int64_t n = begin; n < end; ++n) {
      dequantize_row<kBits>(weight, n, row);
      int64_t k = 0;
      for (; k + 4 <= weight.k; k += 4) {
        Float4 four;
        std::memcpy(&four, row + k, sizeof(four));
        store_four(out, out_dtype, n * weight.k + k, 4, four);
      }
      for (; k < weight.k; ++k) store_element(out, out_dtype, n * weight.k + k, row[k]);
    }
  });
}

}  // namespace

const Int4WeightKernels int4_weight_kernels = {pack_rows, unpack_rows, dequantize_rows};

}  // namespace pumice::cpu::PUMICE_ISA
