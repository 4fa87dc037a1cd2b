// One panel of the int4 product: kPanel weight rows side by side in the lanes of a vector register.
// One header for each instruction set gives
//
//   kPanel, Lanes       columns of y at a time, and a register of floats for them
//   load_floats         a register of floats from fp32, fp16, bf16 or uint8
//   transpose_floats    a square of floats
//   load_nibbles        a block of the kPanel weight rows: nibbles[word][even, odd][row][4], bytes
//   IntLanes, dot       sums of products of nibbles and digits, kRows rows of x to kPanel columns
#pragma once

#include <cstdint>

#include "cpu/int4_kernels.h"

#if defined(__AVX512VNNI__)
#include "cpu/int4_panel_avx512vnni.h"
#elif defined(__AVX2__)
#include "cpu/int4_panel_avx2.h"
#endif
