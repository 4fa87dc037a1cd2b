// mma.sync (sm_80): a warp multiplies a 16 × K tile A by a K × 8 tile B on the tensor cores and
// adds the product to the 16 × 8 tile D, in place.
//
// Fragments, with g = lane / 4 and t = lane mod 4. A 32-bit register holds E consecutive elements
// along K: 4 of int8 (K = 32), 2 of fp16 or bf16 (K = 16), the first in the lowest bits.
//
//   A  a[0]: row g,     k = E·t ..         B  b[0]: column g, k = E·t ..
//      a[1]: row g + 8, k = E·t ..            b[1]: column g, k = E·t + K/2 ..
//      a[2]: row g,     k = E·t + K/2 ..
//      a[3]: row g + 8, k = E·t + K/2 ..
//
//   D  d[0], d[1]: row g,     columns 2t, 2t + 1
//      d[2], d[3]: row g + 8, columns 2t, 2t + 1
//
// That is the order ldmatrix delivers: A from four 8 × 16-byte matrices (top left, bottom left, top
// right, bottom right), B from a matrix stored as [N][K], two matrices side by side along K.
#pragma once

#include "cuda/device.h"

namespace pumice::ptx {

// int8 × int8 into int32; wraps around on overflow, where the instruction with .satfinite would
// clamp, so the caller bounds K.
__device__ __forceinline__ void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[2]) {
#ifdef PUMICE_EMULATED
  emulator::mma_m16n8k32_s8(d, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// fp16 × fp16 into fp32.
__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
#ifdef PUMICE_EMULATED
  emulator::mma_m16n8k16_f16(d, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// bf16 × bf16 into fp32.
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
#ifdef PUMICE_EMULATED
  emulator::mma_m16n8k16_bf16(d, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace pumice::ptx
