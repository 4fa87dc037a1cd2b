// Checked arguments of the 2:4 operators, shared by the CPU and CUDA entry points.
#pragma once

#include "common/int8_args.h"
#include "common/intn_args.h"
#include "common/sparse24_layout.h"

namespace pumice {

inline bool is_sparse24_dtype(ScalarType dtype) {
  return is_floating_activation(dtype) || dtype == ScalarType::Char;
}

inline int64_t element_bytes(ScalarType dtype) {
  return dtype == ScalarType::Char ? 1 : size_of(to_dtype(dtype));
}

// A dense matrix [N, K] to be compressed, or of which kept places are gathered.
struct Sparse24DenseArgs {
  Tensor dense;  // contiguous
  int64_t n, k;
};

inline Sparse24DenseArgs check_sparse24_dense(const char* op, const Tensor& dense) {
  PUMICE_CHECK(dense.dim() == 2 && dense.size(0) >= 1 && dense.size(1) >= 1, op,
               "the matrix must have shape [N, K] with N, K >= 1");
  PUMICE_CHECK(is_sparse24_dtype(dense.scalar_type()), op,
               "the matrix must be float32, float16, bfloat16 or int8");
  const int64_t k = dense.size(1);
  PUMICE_CHECK(k % kSparse24Group == 0, op, "K must be a multiple of 4, not ", k);
  return {torch::stable::contiguous(dense), dense.size(0), k};
}

inline const uint8_t* check_sparse24_meta(const char* op, const Tensor& meta, int64_t n, int64_t k,
                                          const Tensor& like) {
  PUMICE_CHECK(meta.scalar_type() == ScalarType::Byte, op, "meta must be uint8");
  check_matrix(op, "meta", meta, n, sparse24_meta_bytes(k), like);
  return static_cast<const uint8_t*>(meta.const_data_ptr());
}

// A compressed matrix: values [N, K/2] and meta [N, sparse24_meta_bytes(K)], both contiguous.
struct Sparse24Weight {
  const void* values;
  const uint8_t* meta;
  int64_t n, k;
};

inline Sparse24Weight check_sparse24_weight(const char* op, const Tensor& values,
                                            const Tensor& meta) {
  PUMICE_CHECK(is_sparse24_dtype(values.scalar_type()), op,
               "values must be float32, float16, bfloat16 or int8");
  check_matrix(op, "values", values, -1, -1, values);
  const int64_t n = values.size(0), k = 2 * values.size(1);
  PUMICE_CHECK(n >= 1 && k >= 1, op, "values is empty");
  PUMICE_CHECK(k % kSparse24Group == 0, op, "values must have an even number of columns, K/2");
  return {values.const_data_ptr(), check_sparse24_meta(op, meta, n, k, values), n, k};
}

struct Sparse24LinearArgs {
  Tensor x;     // contiguous, M × K
  DType dtype;  // of x, values and y
  int64_t m;
  Sparse24Weight weight;
  VectorView bias;
};

inline Sparse24LinearArgs check_sparse24_linear(const Tensor& x, const Tensor& values,
                                                const Tensor& meta,
                                                const std::optional<Tensor>& bias) {
  const char* op = "pumice::sparse24_linear";
  check_floating(op, "x", x);
  PUMICE_CHECK(values.scalar_type() == x.scalar_type(), op, "values must have the dtype of x");
  const Sparse24Weight weight = check_sparse24_weight(op, values, meta);
  PUMICE_CHECK(x.dim() >= 1 && x.size(-1) == weight.k, op,
               "the last dimension of x must be K = ", weight.k);
  PUMICE_CHECK(same_device(x, values), op, "values must be on the device of the input");
  if (bias) check_vector(op, "bias", *bias, weight.n, x);
  return {torch::stable::contiguous(x), to_dtype(x.scalar_type()), x.numel() / weight.k, weight,
          view_of(bias)};
}

struct Sparse24Int8LinearArgs {
  Tensor q;      // [M, K] int8, contiguous
  Tensor scale;  // [M] or [1] fp32, contiguous
  bool per_tensor;
  int64_t m;
  Sparse24Weight weight;  // int8 values
  Tensor weight_scale;    // [N] or [1] fp32
  VectorView bias;
};

inline Sparse24Int8LinearArgs check_sparse24_int8_linear(const Tensor& q, const Tensor& scale,
                                                         const Tensor& values, const Tensor& meta,
                                                         const Tensor& weight_scale,
                                                         const std::optional<Tensor>& bias,
                                                         ScalarType out_dtype) {
  const char* op = "pumice::sparse24_int8_linear";
  PUMICE_CHECK(q.scalar_type() == ScalarType::Char, op, "q must be int8");
  PUMICE_CHECK(values.scalar_type() == ScalarType::Char, op, "values must be int8");
  PUMICE_CHECK(is_floating_activation(out_dtype), op,
               "out_dtype must be float32, float16 or bfloat16");
  const Sparse24Weight weight = check_sparse24_weight(op, values, meta);
  PUMICE_CHECK(weight.k <= kMaxInt8K, op, "K = ", weight.k, " is over ", kMaxInt8K,
               ", beyond which int32 sums can overflow");
  PUMICE_CHECK(q.dim() >= 1 && q.size(-1) == weight.k, op,
               "the last dimension of q must be K = ", weight.k);
  PUMICE_CHECK(same_device(q, values), op, "values must be on the device of the input");
  const int64_t m = q.numel() / weight.k;
  check_float32(op, "scale", scale);
  PUMICE_CHECK(same_device(scale, q), op, "scale must be on the device of q");
  PUMICE_CHECK(scale.numel() == 1 || scale.numel() == m, op, "scale must hold 1 or M = ", m,
               " elements, not ", scale.numel());
  check_vector(op, "weight_scale", weight_scale, weight_scale.numel() == 1 ? 1 : weight.n, q);
  check_float32(op, "weight_scale", weight_scale);
  if (bias) check_vector(op, "bias", *bias, weight.n, q);
  return {torch::stable::contiguous(q),
          torch::stable::contiguous(scale),
          scale.numel() == 1,
          m,
          weight,
          weight_scale,
          view_of(bias)};
}

// Groups of the scales are so many columns of W, or a multiple: then they are half as many kept
// weights, of which the packed words have a multiple of kGroupMultiple too.
constexpr int64_t kSparse24GroupMultiple = 2 * kGroupMultiple;

struct Sparse24Int4LinearArgs {
  Tensor x;  // contiguous, M × K
  DType dtype;
  int64_t m, k;
  IntnWeight kept;      // [N, K/2]: its k and group_size count kept weights
  const uint8_t* meta;  // [N, sparse24_meta_bytes(K)]
  VectorView bias;
};

inline Sparse24Int4LinearArgs check_sparse24_int4_linear(const Tensor& x, const Tensor& qvalues,
                                                         const Tensor& meta, const Tensor& scales,
                                                         const std::optional<Tensor>& zeros,
                                                         const std::optional<Tensor>& bias,
                                                         int64_t group_size, int64_t bits) {
  const char* op = "pumice::sparse24_int4_linear";
  PUMICE_CHECK(x.dim() >= 1, op, "x must have at least one dimension");
  check_floating(op, "x", x);
  const int64_t k = x.size(-1);
  PUMICE_CHECK(k >= 1 && k % kSparse24Group == 0, op, "K must be a multiple of 4, not ", k);
  PUMICE_CHECK(group_size == -1 || (group_size > 0 && group_size % kSparse24GroupMultiple == 0), op,
               "group_size must be -1 or a positive multiple of ", kSparse24GroupMultiple, ", not ",
               group_size);
  PUMICE_CHECK(same_device(x, qvalues), op, "qvalues must be on the device of the input");
  Sparse24Int4LinearArgs args{};
  args.kept = check_intn_weight(op, qvalues, scales, zeros, std::nullopt, k / 2,
                                group_size < 0 ? -1 : group_size / 2, bits);
  args.meta = check_sparse24_meta(op, meta, args.kept.n, k, x);
  args.x = torch::stable::contiguous(x);
  args.dtype = to_dtype(x.scalar_type());
  args.m = x.numel() / k;
  args.k = k;
  if (bias) check_vector(op, "bias", *bias, args.kept.n, x);
  args.bias = view_of(bias);
  return args;
}

}  // namespace pumice
