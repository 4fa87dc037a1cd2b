// Checked arguments of the int8 operators, shared by the CPU and CUDA entry points. Python has
// validated before (python/pumice/ops/); this is the second wall, for callers of torch.ops.
#pragma once

#include "common/args.h"
#include "common/int8_numerics.h"

namespace pumice {

struct Int8QuantizeArgs {
  Tensor x;  // contiguous, M × K
  DType dtype;
  int64_t m, k;
  bool per_tensor;
  bool has_threshold;
  float threshold;
  std::optional<Tensor> smooth;        // [K] fp32
  std::optional<Tensor> static_scale;  // [1] fp32
};

inline Int8QuantizeArgs check_int8_quantize(const Tensor& x, bool per_tensor,
                                            const std::optional<double>& threshold,
                                            const std::optional<Tensor>& smooth,
                                            const std::optional<Tensor>& scale) {
  const char* op = "pumice::int8_quantize";
  PUMICE_CHECK(x.dim() >= 1, op, "x must have at least one dimension");
  PUMICE_CHECK(is_floating_activation(x.scalar_type()), op,
               "x must be float32, float16 or bfloat16");
  const int64_t k = x.size(-1);
  PUMICE_CHECK(k >= 1, op, "the last dimension of x is empty");
  PUMICE_CHECK(!threshold || *threshold > 0, op, "threshold must be positive");
  if (smooth) {
    check_vector(op, "smooth", *smooth, k, x);
    check_float32(op, "smooth", *smooth);
  }
  if (scale) {
    check_vector(op, "scale", *scale, 1, x);
    check_float32(op, "scale", *scale);
    PUMICE_CHECK(per_tensor, op, "a given scale is one for the tensor: pass per_tensor=True");
    PUMICE_CHECK(!threshold, op, "a given scale and a threshold exclude each other");
  }
  return {torch::stable::contiguous(x),
          to_dtype(x.scalar_type()),
          x.numel() / k,
          k,
          per_tensor,
          threshold.has_value(),
          static_cast<float>(threshold.value_or(0.0)),
          smooth,
          scale};
}

struct Int8WeightArgs {
  Tensor qweight;  // [N, K] int8, contiguous
  Tensor scale;    // [N] or [1] fp32
  VectorView bias;
  int64_t n, k;
};

inline Int8WeightArgs check_int8_weight(const char* op, const Tensor& x, const Tensor& qweight,
                                        const Tensor& scale, const std::optional<Tensor>& bias) {
  PUMICE_CHECK(qweight.dim() == 2 && qweight.scalar_type() == ScalarType::Char, op,
               "qweight must be an int8 matrix [N, K]");
  const int64_t n = qweight.size(0), k = qweight.size(1);
  PUMICE_CHECK(n >= 1 && k >= 1, op, "qweight is empty");
  PUMICE_CHECK(k <= kMaxInt8K, op, "K = ", k, " is over ", kMaxInt8K,
               ", beyond which int32 sums can overflow");
  PUMICE_CHECK(x.dim() >= 1 && x.size(-1) == k, op,
               "the last dimension of the input must be K = ", k);
  PUMICE_CHECK(same_device(qweight, x), op, "qweight must be on the device of the input");
  check_vector(op, "weight_scale", scale, scale.numel() == 1 ? 1 : n, x);
  check_float32(op, "weight_scale", scale);
  if (bias) check_vector(op, "bias", *bias, n, x);
  return {torch::stable::contiguous(qweight), scale, view_of(bias), n, k};
}

struct Int8LinearArgs {
  Tensor q;      // [M, K] int8, contiguous
  Tensor scale;  // [M] or [1] fp32, contiguous
  Int8WeightArgs weight;
  int64_t m;
  bool per_tensor;
};

inline Int8LinearArgs check_int8_linear(const Tensor& q, const Tensor& scale, const Tensor& qweight,
                                        const Tensor& weight_scale,
                                        const std::optional<Tensor>& bias, ScalarType out_dtype) {
  const char* op = "pumice::int8_linear";
  const Int8WeightArgs weight = check_int8_weight(op, q, qweight, weight_scale, bias);
  PUMICE_CHECK(q.scalar_type() == ScalarType::Char, op, "q must be int8");
  PUMICE_CHECK(is_floating_activation(out_dtype), op,
               "out_dtype must be float32, float16 or bfloat16");
  const int64_t m = q.numel() / weight.k;
  check_float32(op, "scale", scale);
  PUMICE_CHECK(same_device(scale, q), op, "scale must be on the device of q");
  PUMICE_CHECK(scale.numel() == 1 || scale.numel() == m, op, "scale must hold 1 or M = ", m,
               " elements, not ", scale.numel());
  return {torch::stable::contiguous(q), torch::stable::contiguous(scale), weight, m,
          scale.numel() == 1};
}

struct Int8MixedArgs {
  Tensor x;  // contiguous, M × K
  DType dtype;
  Int8WeightArgs weight;
  int64_t m;
  float threshold;
};

inline Int8MixedArgs check_int8_mixed_linear(const Tensor& x, const Tensor& qweight,
                                             const Tensor& weight_scale,
                                             const std::optional<Tensor>& bias, double threshold) {
  const char* op = "pumice::int8_mixed_linear";
  PUMICE_CHECK(is_floating_activation(x.scalar_type()), op,
               "x must be float32, float16 or bfloat16");
  PUMICE_CHECK(threshold > 0, op, "threshold must be positive");
  const Int8WeightArgs weight = check_int8_weight(op, x, qweight, weight_scale, bias);
  return {torch::stable::contiguous(x), to_dtype(x.scalar_type()), weight, x.numel() / weight.k,
          static_cast<float>(threshold)};
}

}  // namespace pumice
