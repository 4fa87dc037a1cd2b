// Floating-point products of panels: kRowLanes weight rows in the lanes of registers
// (sparse24_lanes.h), which walk along K together.
//
// A group's four elements of a row of x are one broadcast load; each weight row picks its two of
// them by a shuffle within 128-bit lanes. What the shuffle and the product need of the weight, a
// Group, is made once for a block of K and used for every row of x. One header for each instruction
// set gives
//
//   FloatGroup             products in fp32: two picks and two multiply-adds
//   PairGroup              with AVX512-BF16: of pairs of bf16, one of each
//   GroupOf<dtype>         the one of the two for a dtype
//   kPanels<Group>         panels side by side, and
//   kTileRows<Group>       rows of x, whose sums registers hold
//   kBlockGroups<Group>    groups that, decoded for kPanels panels, leave L1 room for x
//   kFewRows<Group, dtype> rows of x up to which the kernels for few are faster
//   store_lanes<dtype>     sums, rounded
//
// (the portable kernels have no panels).
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/element.h"
#include "cpu/sparse24_lanes.h"

#if defined(__AVX2__)

namespace pumice::cpu::PUMICE_ISA {
namespace {

// Keeps GCC from loading x again at each of its uses, which costs more than a register here.
template <typename T>
inline __attribute__((always_inline)) T in_register(T x) {
  asm("" : "+v"(x));
  return x;
}

}  // namespace
}  // namespace pumice::cpu::PUMICE_ISA

#if defined(__AVX512VNNI__)
#include "cpu/sparse24_float_panel_avx512vnni.h"
#else
#include "cpu/sparse24_float_panel_avx2.h"
#endif

#endif
