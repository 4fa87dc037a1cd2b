// mma.sp (sm_80): mma.sync with a 2:4 sparse A. Of each 4 neighbours along K two are kept, and the
// tensor cores skip the others: twice the K of mma.sync with the same A, in the same time.
//
// Fragments, with g = lane / 4 and t = lane mod 4. Kept values take the places that mma.sync has
// for all of them (mma.h), in the order of their columns; D is as there; B has twice the registers:
//
//   B  b[i]: column g, of K the bytes 16·i + 4·t .. 16·i + 4·t + 3
//
// The metadata is a nibble for each group of four: idx0 | idx1 << 2, the columns of the two that
// are kept, idx0 < idx1 ("ordered metadata"; without it the instruction may be much slower on some
// targets, says the PTX ISA). A word is 8 groups, 32 columns, the first in the lowest bits:
//
//   int8   K = 64   lane t gives a word, row g + 8·(t mod 2), the columns from 32·(t / 2) on
//   16 bit K = 32   two of four lanes, t = 2·kSelector + h with h = 0, 1, give half a word of two
//                   rows, the columns from 16·h on: row g in bits 0-15, row g + 8 in bits 16-31
//
// What the other two lanes give in 16 bit is not read: one register can hold the metadata of two
// products, for the selectors 0 and 1.
#pragma once

#include "cuda/device.h"

namespace pumice::ptx {

// int8 × int8 into int32; wraps around on overflow.
__device__ __forceinline__ void mma_sp_m16n8k64_s8(int32_t (&d)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[4], uint32_t metadata) {
#ifdef PUMICE_EMULATED
  emulator::mma_sp_m16n8k64_s8(d, a, b, metadata);
#else
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;\n"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
        "r"(metadata));
#endif
}

// fp16 × fp16 into fp32.
template <int kSelector>
__device__ __forceinline__ void mma_sp_m16n8k32_f16(float (&d)[4], const uint32_t (&a)[4],
                                                    const uint32_t (&b)[4], uint32_t metadata) {
  static_assert(kSelector == 0 || kSelector == 1);
#ifdef PUMICE_EMULATED
  emulator::mma_sp_m16n8k32_f16(d, a, b, metadata, kSelector);
#else
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
        "r"(metadata), "n"(kSelector));
#endif
}

// bf16 × bf16 into fp32.
template <int kSelector>
__device__ __forceinline__ void mma_sp_m16n8k32_bf16(float (&d)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[4], uint32_t metadata) {
  static_assert(kSelector == 0 || kSelector == 1);
#ifdef PUMICE_EMULATED
  emulator::mma_sp_m16n8k32_bf16(d, a, b, metadata, kSelector);
#else
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
        "r"(metadata), "n"(kSelector));
#endif
}

}  // namespace pumice::ptx
