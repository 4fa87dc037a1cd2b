// One panel of the int8 2:4 product: kRowLanes weight rows side by side in the lanes of a register.
// A step is eight columns, four kept weights of each row, a 32-bit word. One header for each
// instruction set gives
//
//   PanelElement, prepare_element   what the kernel keeps of an element of q
//   kTileRows           at most so many rows of x have their sums in registers
//   Step, decode        where the kept weights stood, as the shuffles of x take it, and the weights
//   add_step            sums[i] += Σ picked · weights of a step, of kRows rows of x, in the lanes
//   add_correction, exact_sums      what is taken off the sums in the end
#pragma once

#include <cstdint>

#include "cpu/sparse24_lanes.h"

namespace pumice::cpu::PUMICE_ISA {

constexpr int64_t kStepColumns = 8;
constexpr int kWordSteps = 4;  // of a word of meta

}  // namespace pumice::cpu::PUMICE_ISA

#if defined(__AVX512VNNI__)
#include "cpu/sparse24_int8_panel_avx512vnni.h"
#elif defined(__AVX2__)
#include "cpu/sparse24_int8_panel_avx2.h"
#endif
