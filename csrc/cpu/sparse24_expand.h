// Rows of 2:4 weights written out with the vector unit. One header for each instruction set gives
//
//   expand_groups<element>   groups of four elements of 1, 2 or 4 bytes from their kept pairs
//
// as far as whole registers go: it returns how many groups are written.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512VNNI__)
#include "cpu/sparse24_expand_avx512vnni.h"
#elif defined(__AVX2__)
#include "cpu/sparse24_expand_avx2.h"
#else

namespace pumice::cpu::PUMICE_ISA {
namespace {

template <int kElement>
inline int64_t expand_groups(const uint8_t* /*values*/, const uint8_t* /*meta*/, int64_t /*groups*/,
                             uint8_t* /*w*/) {
  return 0;
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA

#endif
