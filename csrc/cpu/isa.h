// Which instruction set the CPU kernels run on. No torch here: `_C` reports it too.
#pragma once

namespace pumice::cpu {

// Each holds those before it. kAvx512Bf16 has kernels of its own where they use its instructions
// (attention forward, 2:4 products), else those of kAvx512Vnni.
enum class Isa { kPortable, kAvx2, kAvx512Vnni, kAvx512Bf16 };

const char* name_of(Isa isa);

// The widest set this machine has and this build holds.
Isa detect_isa();

// detect_isa(), lowered (never raised) by PUMICE_CPU_ISA=portable|avx2|avx512vnni|avx512bf16; read
// once.
Isa active_isa();

}  // namespace pumice::cpu
