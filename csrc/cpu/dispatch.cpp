#include "cpu/dispatch.h"

#include "cpu/isa.h"

namespace pumice::cpu {

// A build for another processor holds the portable kernels alone.
#if defined(PUMICE_HAS_ISA_avx2) && defined(PUMICE_HAS_ISA_avx512vnni)
#define PUMICE_SELECT(table)                            \
  (active_isa() >= Isa::kAvx512Vnni ? avx512vnni::table \
   : active_isa() == Isa::kAvx2     ? avx2::table       \
                                    : portable::table)
#else
#define PUMICE_SELECT(table) (portable::table)
#endif

const AttentionForwardKernels& attention_forward_kernels() {
#if defined(PUMICE_HAS_ISA_avx512bf16)
  if (active_isa() == Isa::kAvx512Bf16) return avx512bf16::attention_forward_kernels;
#endif
  static const AttentionForwardKernels& kernels = PUMICE_SELECT(attention_forward_kernels);
  return kernels;
}

const AttentionMergeKernels& attention_merge_kernels() {
  static const AttentionMergeKernels& kernels = PUMICE_SELECT(attention_merge_kernels);
  return kernels;
}

const Int8QuantizeKernels& int8_quantize_kernels() {
  static const Int8QuantizeKernels& kernels = PUMICE_SELECT(int8_quantize_kernels);
  return kernels;
}

const Int8GemmKernels& int8_gemm_kernels() {
  static const Int8GemmKernels& kernels = PUMICE_SELECT(int8_gemm_kernels);
  return kernels;
}

const Int4WeightKernels& int4_weight_kernels() {
  static const Int4WeightKernels& kernels = PUMICE_SELECT(int4_weight_kernels);
  return kernels;
}

const Int4GemmKernels& int4_gemm_kernels() {
  static const Int4GemmKernels& kernels = PUMICE_SELECT(int4_gemm_kernels);
  return kernels;
}

const Int4DigitKernels& int4_few_kernels() {
  static const Int4DigitKernels& kernels = PUMICE_SELECT(int4_few_kernels);
  return kernels;
}

const Int4DigitKernels& int4_panel_kernels() {
  static const Int4DigitKernels& kernels = PUMICE_SELECT(int4_panel_kernels);
  return kernels;
}

const AttentionBackwardKernels& attention_backward_kernels() {
  static const AttentionBackwardKernels& kernels = PUMICE_SELECT(attention_backward_kernels);
  return kernels;
}

const PagedKernels& paged_kernels() {
  static const PagedKernels& kernels = PUMICE_SELECT(paged_kernels);
  return kernels;
}

const SamplingKernels& sampling_kernels() {
  static const SamplingKernels& kernels = PUMICE_SELECT(sampling_kernels);
  return kernels;
}

const VerifyKernels& verify_kernels() {
  static const VerifyKernels& kernels = PUMICE_SELECT(verify_kernels);
  return kernels;
}

const Sparse24WeightKernels& sparse24_weight_kernels() {
  static const Sparse24WeightKernels& kernels = PUMICE_SELECT(sparse24_weight_kernels);
  return kernels;
}

const Sparse24FloatKernels& sparse24_float_kernels() {
  static const Sparse24FloatKernels& kernels = PUMICE_SELECT(sparse24_float_kernels);
  return kernels;
}

const Sparse24FloatPanelKernels& sparse24_float_panel_kernels() {
#if defined(PUMICE_HAS_ISA_avx512bf16)
  if (active_isa() == Isa::kAvx512Bf16) return avx512bf16::sparse24_float_panel_kernels;
#endif
  static const Sparse24FloatPanelKernels& kernels = PUMICE_SELECT(sparse24_float_panel_kernels);
  return kernels;
}

const Sparse24Int8Kernels& sparse24_int8_kernels() {
  static const Sparse24Int8Kernels& kernels = PUMICE_SELECT(sparse24_int8_kernels);
  return kernels;
}

const Sparse24Int8PanelKernels& sparse24_int8_panel_kernels() {
  static const Sparse24Int8PanelKernels& kernels = PUMICE_SELECT(sparse24_int8_panel_kernels);
  return kernels;
}

const Sparse24Int4Kernels& sparse24_int4_kernels() {
  static const Sparse24Int4Kernels& kernels = PUMICE_SELECT(sparse24_int4_kernels);
  return kernels;
}

}  // namespace pumice::cpu
