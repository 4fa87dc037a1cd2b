// Rows that do not start at multiples of 16 bytes.
#pragma once

#include "cuda/device.h"

namespace pumice::cuda {

// The 16 bytes at any address, of which `valid` exist (the others become 0): words where they are
// aligned, else bytes.
__device__ __forceinline__ uint4 load_unaligned_16(const void* source, int64_t valid) {
  uint32_t words[4] = {};
  if (valid >= 16 && reinterpret_cast<uintptr_t>(source) % 4 == 0) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = static_cast<const uint32_t*>(source)[i];
  } else {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const uint32_t byte = i < valid ? static_cast<const uint8_t*>(source)[i] : 0;
      words[i / 4] |= byte << (i % 4 * 8);
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

inline bool rows_are_aligned_16(const void* pointer, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && row_bytes % 16 == 0;
}

}  // namespace pumice::cuda
