#include "cpu/isa.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace pumice::cpu {

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16:
      return "avx512bf16";
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
  if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::kAvx512Bf16;
  if (avx2 && avx512) return Isa::kAvx512Vnni;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

Isa active_isa() {
  static const Isa isa = [] {
    const Isa detected = detect_isa();
    const char* wanted = std::getenv("PUMICE_CPU_ISA");
    for (Isa lower : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512Vnni, Isa::kAvx512Bf16}) {
      if (wanted && std::strcmp(wanted, name_of(lower)) == 0) return std::min(lower, detected);
    }
    return detected;
  }();
  return isa;
}

}  // namespace pumice::cpu
