// ex2.approx (sm_20; .ftz): 2^x by the special function unit, 16 a clock and SM.
//
// At most 2 units in the last place; subnormal results are zero. exp2f() of the CUDA library scales
// its argument to keep those, which takes four instructions more.
#pragma once

#include "cuda/device.h"

namespace pumice::ptx {

__device__ __forceinline__ float exp2_approx(float x) {
#ifdef PUMICE_EMULATED
  constexpr float kSmallestNormal = 0x1p-126f;
  const float y = exp2f(x);
  return y < kSmallestNormal ? 0.0f : y;
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace pumice::ptx
