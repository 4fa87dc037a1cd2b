// Picking the elements of x, in fp32, that kept weights multiply. One header for each instruction
// set gives
//
//   kFloats, Lanes        a register of floats: so many kept weights, of twice as many columns
//   load_places           where they stood, from kFloats / 4 bytes of meta
//   pick                  their elements of a block of 2·kFloats of x, ordered by order_chunks
//   load_values<dtype>    the weights themselves, the first `count` of them or all
//   multiply_add, sum_of
#pragma once

#include <cstdint>

#include "cpu/element.h"

#if defined(__AVX512VNNI__)
#include "cpu/sparse24_pick_avx512vnni.h"
#elif defined(__AVX2__)
#include "cpu/sparse24_pick_avx2.h"
#else
#include "cpu/sparse24_pick_portable.h"
#endif
