// Which instruction set the CPU kernels run on. No torch here: `_C` reports it too.
#pragma once

namespace pumice::cpu {

enum class Isa { kPortable, kAvx2, kAvx512Vnni };

const char* name_of(Isa isa);

// The widest set this machine has and this build holds.
Isa detect_isa();

// detect_isa(), lowered (never raised) by PUMICE_CPU_ISA=portable|avx2|avx512vnni; read once.
Isa active_isa();

// Whether to use AVX512-BF16 on top of kAvx512Vnni: where the machine has it and PUMICE_CPU_ISA does
// not name a set, each of which is without.
bool active_avx512_bf16();

}  // namespace pumice::cpu
