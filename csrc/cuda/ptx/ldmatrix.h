// ldmatrix (sm_75): a warp loads 1, 2 or 4 matrices of 8 rows × 16 bytes from shared memory,
// straight into the layout that mma.sync wants its operands in.
//
// Lane 8·i + r gives the address of row r of matrix i, a multiple of 16; lanes from 8·count on give
// none that is read. Register i of lane L then holds bytes 4·(L mod 4) .. +3 of row L / 4 of matrix
// i. All 8 rows must lie in different banks for one pass, which is why tiles are swizzled.
//
// As 8 × 8 matrices of 16-bit elements, .trans hands out the transpose: register i of lane L holds
// the elements [2·(L mod 4)][L / 4] (low half) and [2·(L mod 4) + 1][L / 4] (high half).
#pragma once

#include "cuda/device.h"

namespace pumice::ptx {

__device__ __forceinline__ void ldmatrix_x1(uint32_t& r, const void* row) {
#ifdef PUMICE_EMULATED
  emulator::ldmatrix<1, false>({&r}, row);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];\n"
               : "=r"(r)
               : "r"(address)
               : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t& r0, uint32_t& r1, const void* row) {
#ifdef PUMICE_EMULATED
  emulator::ldmatrix<2, false>({&r0, &r1}, row);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(r0), "=r"(r1)
               : "r"(address)
               : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3,
                                            const void* row) {
#ifdef PUMICE_EMULATED
  emulator::ldmatrix<4, false>({&r0, &r1, &r2, &r3}, row);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
               : "r"(address)
               : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  ldmatrix_x4(r[0], r[1], r[2], r[3], row);
}

__device__ __forceinline__ void ldmatrix_x1_trans(uint32_t& r, const void* row) {
#ifdef PUMICE_EMULATED
  emulator::ldmatrix<1, true>({&r}, row);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];\n"
               : "=r"(r)
               : "r"(address)
               : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t& r0, uint32_t& r1, const void* row) {
#ifdef PUMICE_EMULATED
  emulator::ldmatrix<2, true>({&r0, &r1}, row);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(r0), "=r"(r1)
               : "r"(address)
               : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t& r0, uint32_t& r1, uint32_t& r2,
                                                  uint32_t& r3, const void* row) {
#ifdef PUMICE_EMULATED
  emulator::ldmatrix<4, true>({&r0, &r1, &r2, &r3}, row);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
               : "r"(address)
               : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  ldmatrix_x4_trans(r[0], r[1], r[2], r[3], row);
}

}  // namespace pumice::ptx
