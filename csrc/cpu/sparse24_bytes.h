// Picking the bytes of x that kept weights multiply. One header for each instruction set gives
//
//   kBytes              a register: so many kept weights, of twice as many columns
//   prepare_byte        what the kernel keeps of an element of q
//   IntLanes, Places, zero_lanes
//   load_places         where kBytes weights stood, from kBytes / 4 bytes of meta
//   pick                their elements of a block of 2·kBytes of x, ordered by order_chunks
//   Values, load_values the weights as the product takes them
//   add_products        acc + Σ picked · weights, in the lanes
//   add_correction, exact_sum   what is taken off the sum of a weight row in the end
#pragma once

#include <cstdint>

#if defined(__AVX512VNNI__)
#include "cpu/sparse24_bytes_avx512vnni.h"
#elif defined(__AVX2__)
#include "cpu/sparse24_bytes_avx2.h"
#else
#include "cpu/sparse24_bytes_portable.h"
#endif
