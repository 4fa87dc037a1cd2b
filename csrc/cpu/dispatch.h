// The kernels of the instruction set in use (isa.h), chosen once.
#pragma once

#include "cpu/attention_backward.h"
#include "cpu/attention_forward.h"
#include "cpu/int4_kernels.h"
#include "cpu/int8_kernels.h"
#include "cpu/paged_kernels.h"
#include "cpu/sampling_kernels.h"
#include "cpu/sparse24_kernels.h"

namespace pumice::cpu {

const AttentionForwardKernels& attention_forward_kernels();
const AttentionMergeKernels& attention_merge_kernels();
const Int8QuantizeKernels& int8_quantize_kernels();
const Int8GemmKernels& int8_gemm_kernels();
const Int4WeightKernels& int4_weight_kernels();
const Int4GemmKernels& int4_gemm_kernels();
const Int4DigitKernels& int4_few_kernels();
const Int4DigitKernels& int4_panel_kernels();
const AttentionBackwardKernels& attention_backward_kernels();
const PagedKernels& paged_kernels();
const Sparse24WeightKernels& sparse24_weight_kernels();
const Sparse24FloatKernels& sparse24_float_kernels();
const Sparse24FloatPanelKernels& sparse24_float_panel_kernels();
const Sparse24Int8Kernels& sparse24_int8_kernels();
const Sparse24Int8PanelKernels& sparse24_int8_panel_kernels();
const Sparse24Int4Kernels& sparse24_int4_kernels();
const SamplingKernels& sampling_kernels();
const VerifyKernels& verify_kernels();

}  // namespace pumice::cpu
