// mma.sp, with the fragments and the metadata that csrc/cuda/ptx/mma_sp.h documents.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

#include "emulator/block.h"

namespace pumice::emulator {
namespace {

constexpr int kM = 16, kN = 8;

template <class Accumulator>
struct MmaSpArgument {
  Accumulator* d;
  const uint32_t* a;
  const uint32_t* b;
  uint32_t metadata;
  int selector;
};

template <class Accumulator>
const MmaSpArgument<Accumulator>& argument_of(void* const* lanes, int lane) {
  return *static_cast<const MmaSpArgument<Accumulator>*>(lanes[lane]);
}

template <class Element, class Wide>
void unpack(uint32_t word, Wide* out) {
  Element elements[4 / sizeof(Element)];
  std::memcpy(static_cast<void*>(elements), &word, 4);
  for (size_t e = 0; e < 4 / sizeof(Element); ++e) out[e] = static_cast<Wide>(elements[e]);
}

// The nibble of a group of four columns of a row.
template <class Element, class Accumulator>
uint32_t nibble_of(void* const* lanes, int row, int group) {
  int lane, bit;
  if constexpr (sizeof(Element) == 1) {
    lane = row % 8 * 4 + group / 8 * 2 + row / 8;
    bit = group % 8 * 4;
  } else {
    const int selector = argument_of<Accumulator>(lanes, 0).selector;
    lane = row % 8 * 4 + 2 * selector + group / 4;
    bit = row / 8 * 16 + group % 4 * 4;
  }
  return argument_of<Accumulator>(lanes, lane).metadata >> bit & 15;
}

// D += A·B, summed up as by tensor_core.cpp.
template <class Element, class Wide, class Sum, class Accumulator>
void combine(void* const* lanes, uint32_t /*present*/) {
  constexpr int kPerRegister = 4 / sizeof(Element);
  constexpr int kKept = 8 * kPerRegister, kK = 2 * kKept;
  Wide kept[kM][kKept], b[kN][kK];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& argument = argument_of<Accumulator>(lanes, lane);
    const int g = lane / 4, k = lane % 4 * kPerRegister;
    unpack<Element>(argument.a[0], &kept[g][k]);
    unpack<Element>(argument.a[1], &kept[g + 8][k]);
    unpack<Element>(argument.a[2], &kept[g][k + kKept / 2]);
    unpack<Element>(argument.a[3], &kept[g + 8][k + kKept / 2]);
    for (int i = 0; i < 4; ++i) unpack<Element>(argument.b[i], &b[g][k + i * kK / 4]);
  }
  int column[kM][kKept];
  for (int m = 0; m < kM; ++m) {
    for (int group = 0; group < kKept / 2; ++group) {
      const uint32_t nibble = nibble_of<Element, Accumulator>(lanes, m, group);
      const int first = nibble & 3, second = nibble >> 2;
      if (first >= second) {
        kernel_error("undefined metadata",
                     "or a lane of its warp gives mma.sp two columns that do not ascend");
      }
      column[m][2 * group] = 4 * group + first;
      column[m][2 * group + 1] = 4 * group + second;
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    Accumulator* d = argument_of<Accumulator>(lanes, lane).d;
    for (int i = 0; i < 4; ++i) {
      const int m = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
      Sum sum = 0;
      for (int k = 0; k < kKept; ++k) sum += Sum{kept[m][k]} * Sum{b[n][column[m][k]]};
      if constexpr (std::is_integral_v<Sum>) {
        d[i] = static_cast<int32_t>(static_cast<uint32_t>(d[i]) + static_cast<uint32_t>(sum));
      } else {
        d[i] = static_cast<float>(sum + d[i]);
      }
    }
  }
}

constexpr uint32_t kWholeWarp = 0xffffffffu;

}  // namespace

void mma_sp_m16n8k64_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                        uint32_t metadata) {
  MmaSpArgument<int32_t> argument{d, a, b, metadata, 0};
  warp_rendezvous("mma.sp.m16n8k64.s8", WarpRule::kAligned, kWholeWarp, &argument,
                  combine<int8_t, int16_t, int32_t, int32_t>, __builtin_return_address(0));
}

void mma_sp_m16n8k32_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                         uint32_t metadata, int selector) {
  MmaSpArgument<float> argument{d, a, b, metadata, selector};
  warp_rendezvous("mma.sp.m16n8k32.f16", WarpRule::kAligned, kWholeWarp, &argument,
                  combine<__half, float, double, float>, __builtin_return_address(0));
}

void mma_sp_m16n8k32_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                          uint32_t metadata, int selector) {
  MmaSpArgument<float> argument{d, a, b, metadata, selector};
  warp_rendezvous("mma.sp.m16n8k32.bf16", WarpRule::kAligned, kWholeWarp, &argument,
                  combine<__nv_bfloat16, float, double, float>, __builtin_return_address(0));
}

}  // namespace pumice::emulator
