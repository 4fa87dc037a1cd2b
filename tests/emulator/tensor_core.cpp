// mma.sync, with the fragments that csrc/cuda/ptx/mma.h documents.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

#include "emulator/block.h"

namespace pumice::emulator {
namespace {

constexpr int kM = 16, kN = 8;

template <class Accumulator>
struct MmaArgument {
  Accumulator* d;
  const uint32_t* a;
  const uint32_t* b;
};

// D += A·B, with elements widened to Wide and summed up in Sum. For integers all is exact until the
// last addition, which wraps around as the instruction's does. A floating-point sum is rounded
// once, at its end, while the hardware truncates in steps of its own: equal where all partial sums
// are representable, at least as exact elsewhere.
template <class Element, class Wide, class Sum, class Accumulator, int kK>
void combine(void* const* lanes, uint32_t /*present*/) {
  constexpr int kPerRegister = 4 / sizeof(Element);
  static_assert(kK == 8 * kPerRegister);
  Wide a[kM][kK], b[kN][kK];
  const auto unpack = [](uint32_t word, Wide* out) {
    Element elements[kPerRegister];
    std::memcpy(static_cast<void*>(elements), &word, 4);
    for (int e = 0; e < kPerRegister; ++e) out[e] = static_cast<Wide>(elements[e]);
  };
  for (int lane = 0; lane < 32; ++lane) {
    const auto& argument = *static_cast<const MmaArgument<Accumulator>*>(lanes[lane]);
    const int g = lane / 4, k = lane % 4 * kPerRegister;
    unpack(argument.a[0], &a[g][k]);
    unpack(argument.a[1], &a[g + 8][k]);
    unpack(argument.a[2], &a[g][k + kK / 2]);
    unpack(argument.a[3], &a[g + 8][k + kK / 2]);
    unpack(argument.b[0], &b[g][k]);
    unpack(argument.b[1], &b[g][k + kK / 2]);
  }
  for (int lane = 0; lane < 32; ++lane) {
    Accumulator* d = static_cast<const MmaArgument<Accumulator>*>(lanes[lane])->d;
    for (int i = 0; i < 4; ++i) {
      const int m = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
      Sum sum = 0;
      for (int k = 0; k < kK; ++k) sum += Sum{a[m][k]} * Sum{b[n][k]};
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

void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaArgument<int32_t> argument{d, a, b};
  warp_rendezvous("mma.sync.m16n8k32.s8", WarpRule::kAligned, kWholeWarp, &argument,
                  combine<int8_t, int16_t, int32_t, int32_t, 32>, __builtin_return_address(0));
}

void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaArgument<float> argument{d, a, b};
  warp_rendezvous("mma.sync.m16n8k16.f16", WarpRule::kAligned, kWholeWarp, &argument,
                  combine<__half, float, double, float, 16>, __builtin_return_address(0));
}

void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaArgument<float> argument{d, a, b};
  warp_rendezvous("mma.sync.m16n8k16.bf16", WarpRule::kAligned, kWholeWarp, &argument,
                  combine<__nv_bfloat16, float, double, float, 16>, __builtin_return_address(0));
}

}  // namespace pumice::emulator
