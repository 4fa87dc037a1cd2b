#include "cpu/isa.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace pumice::cpu {

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Vnni:
      return "avx512vnni";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

Isa detect_isa() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx2 && avx512) return Isa::kAvx512Vnni;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

Isa active_isa() {
  static const Isa isa = [] {
    const Isa detected = detect_isa();
    const char* wanted = std::getenv("PUMICE_CPU_ISA");
    for (Isa lower : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512Vnni}) {
      if (wanted && std::strcmp(wanted, name_of(lower)) == 0) return std::min(lower, detected);
    }
    return detected;
  }();
  return isa;
}

bool active_avx512_bf16() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool active = active_isa() == Isa::kAvx512Vnni &&
                             __builtin_cpu_supports("avx512bf16") &&
                             !std::getenv("PUMICE_CPU_ISA");
  return active;
#else
  return false;
#endif
}

}  // namespace pumice::cpu
