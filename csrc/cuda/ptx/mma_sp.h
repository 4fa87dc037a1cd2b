// mma.sp (sm_80): mma.sync with a 2:4 sparse A. Of each 4 neighbours along K two are kept, and the
// tensor cores skip the others: twice the K of mma.sync with the same A registers, in the same
// time.
//
// Fragments, with g = lane / 4 and t = lane mod 4. Kept values take the places that mma.sync
// (mma.h) has for all of them, in the order of their columns; B has twice the registers, each 16
// bytes of K further on; D is as there:
//
//   A  a[0 .. 3]: as in mma.h, kept values in place of columns        B  b[i]: column g, byte 16·i
//   +
//                                                                              4·t .. of K
//
// The metadata is a nibble for each group of four: idx0 | idx1 << 2, idx0 < idx1, the columns of
// the two that are kept ("ordered metadata"; 8 groups are 32 columns in a word, the first in the
// lowest bits). Which lane gives whose:
//
//   f16, bf16  K = 32: two lanes t = 2·kSelector + h of each four, h = 0, 1, give
//              bits 0-15: row g, columns 16·h .. 16·h + 15,   bits 16-31: row g + 8, the same
//              columns
//   int8       K = 64: lane t gives row g + 8·(t mod 2), columns 32·(t / 2) .. 32·(t / 2) + 31
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
