// int4_linear for many tokens: the weight written out in 16 bits, then torch's own product. Host
// code only.
#pragma once

#include "common/intn_args.h"
#include "cuda/tensor_access.h"

namespace pumice::cuda {

// The tensors of int4_linear beside x.
struct Int4Tensors {
  Tensor qweight, scales;
  std::optional<Tensor> zeros, g_idx, perm, bias, outlier_idx, outlier_weight, lora_a, lora_b;
};

// The checked weight with pointers for kernels.
inline IntnWeight device_weight(IntnWeight weight, const Tensor& qweight, const Tensor& scales,
                                const std::optional<Tensor>& zeros,
                                const std::optional<Tensor>& g_idx) {
  weight.qweight = read_pointer<uint32_t>(qweight);
  weight.scales = read_pointer<void>(scales);
  weight.zeros = zeros ? read_pointer<void>(*zeros) : nullptr;
  weight.g_idx = g_idx ? read_pointer<int32_t>(*g_idx) : nullptr;
  return weight;
}

// y [..., N] of the dtype of x, fp16 or bf16. The caller has checked the arguments and opened a
// DeviceGuard.
void int4_linear_dequantized(const Int4LinearArgs& args, const Int4Tensors& tensors, Tensor& y);

}  // namespace pumice::cuda
