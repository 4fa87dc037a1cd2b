# libpumice_cpu: every operator's schema and the CPU kernels.
#
# Each file in PUMICE_CPU_ISA_SOURCES is compiled once per instruction set, into the namespace
# pumice::cpu::PUMICE_ISA; dispatch.cpp chooses a table of function pointers when the library loads.
set(PUMICE_CPU_SOURCES csrc/ops.cpp csrc/cpu/isa.cpp csrc/cpu/dispatch.cpp
    csrc/cpu/attention_run.cpp csrc/cpu/ops_attention.cpp csrc/cpu/ops_attention_backward.cpp
    csrc/cpu/ops_int4.cpp csrc/cpu/ops_int8.cpp csrc/cpu/ops_paged.cpp csrc/cpu/ops_sampling.cpp
    csrc/cpu/ops_sparse24.cpp csrc/cpu/sparse24_dense_float.cpp csrc/cpu/sparse24_dense_int.cpp)
set(PUMICE_CPU_ISA_SOURCES csrc/cpu/attention_backward.cpp csrc/cpu/attention_forward.cpp
    csrc/cpu/attention_merge.cpp
    csrc/cpu/int4_few_rows.cpp csrc/cpu/int4_gemm.cpp
    csrc/cpu/int4_panel_gemm.cpp csrc/cpu/int4_weight.cpp csrc/cpu/int8_gemm.cpp
    csrc/cpu/int8_quantize.cpp csrc/cpu/paged_append.cpp
    csrc/cpu/sampling_rows.cpp csrc/cpu/sampling_verify.cpp
    csrc/cpu/sparse24_few_rows.cpp csrc/cpu/sparse24_float_panel.cpp
    csrc/cpu/sparse24_int4_panel.cpp
    csrc/cpu/sparse24_int8_few_rows.cpp csrc/cpu/sparse24_int8_panel.cpp
    csrc/cpu/sparse24_weight.cpp)

set(PUMICE_CPU_ISAS portable)
set(PUMICE_ISA_FLAGS_portable "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND PUMICE_CPU_ISAS avx2 avx512vnni)
  set(PUMICE_ISA_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(PUMICE_ISA_FLAGS_avx512vnni -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx2
                                  -mfma -mf16c -mprefer-vector-width=512)
  # GCC 12 warns of its own undefined-vector intrinsics (GCC bug 105593).
  list(APPEND PUMICE_ISA_FLAGS_avx512vnni -Wno-maybe-uninitialized -Wno-uninitialized)
  # Instructions that some processors have beyond a set, and the sources that use them.
  set(PUMICE_CPU_EXTENSIONS avx512bf16)
  set(PUMICE_ISA_FLAGS_avx512bf16 ${PUMICE_ISA_FLAGS_avx512vnni} -mavx512bf16)
  set(PUMICE_ISA_SOURCES_avx512bf16 csrc/cpu/attention_forward.cpp
                                    csrc/cpu/sparse24_float_panel.cpp)
endif()

add_library(pumice_cpu SHARED ${PUMICE_CPU_SOURCES})
target_include_directories(pumice_cpu PRIVATE csrc)
target_compile_options(pumice_cpu PRIVATE -Wall -Wextra -Wno-unused-parameter)
target_link_libraries(pumice_cpu PRIVATE torch_stable)

foreach(isa IN LISTS PUMICE_CPU_ISAS PUMICE_CPU_EXTENSIONS)
  if(NOT DEFINED PUMICE_ISA_SOURCES_${isa})
    set(PUMICE_ISA_SOURCES_${isa} ${PUMICE_CPU_ISA_SOURCES})
  endif()
  add_library(pumice_cpu_${isa} OBJECT ${PUMICE_ISA_SOURCES_${isa}})
  target_include_directories(pumice_cpu_${isa} PRIVATE csrc)
  # -fno-tree-pre: GCC's partial redundancy elimination moves accumulators of the tiles to the stack.
  # -ffp-contract=off: a result must not depend on the instruction set by a fused rounding.
  target_compile_options(pumice_cpu_${isa} PRIVATE -O3 -ffp-contract=off -fno-math-errno -Wall
    -Wextra $<$<CXX_COMPILER_ID:GNU>:-fno-tree-pre> ${PUMICE_ISA_FLAGS_${isa}} "-ffile-prefix-map=${CMAKE_SOURCE_DIR}/=")
  target_compile_definitions(pumice_cpu_${isa} PRIVATE PUMICE_ISA=${isa})
  target_compile_definitions(pumice_cpu PRIVATE PUMICE_HAS_ISA_${isa})
  target_sources(pumice_cpu PRIVATE $<TARGET_OBJECTS:pumice_cpu_${isa}>)
endforeach()
