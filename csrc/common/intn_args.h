// Checked arguments of the int4 operators, shared by the CPU and CUDA entry points.
#pragma once

#include "common/args.h"
#include "common/intn_layout.h"

namespace pumice {

inline void check_bits(const char* op, int64_t bits) {
  PUMICE_CHECK(is_intn_width(bits), op, "bits must be 2, 3, 4 or 8, not ", bits);
}

inline void check_group_size(const char* op, int64_t group_size) {
  PUMICE_CHECK(group_size == -1 || (group_size > 0 && group_size % kGroupMultiple == 0), op,
               "group_size must be -1 or a positive multiple of ", kGroupMultiple, ", not ",
               group_size);
}

// A contiguous matrix [rows, columns] (columns < 0: any number) on the device of `like`.
inline void check_matrix(const char* op, const char* name, const Tensor& matrix, int64_t rows,
                         int64_t columns, const Tensor& like) {
  PUMICE_CHECK(matrix.dim() == 2 && (rows < 0 || matrix.size(0) == rows) &&
                   (columns < 0 || matrix.size(1) == columns),
               op, name, " must be a matrix of ", rows, " x ", columns, " (-1: any)");
  PUMICE_CHECK(same_device(matrix, like), op, name, " must be on the device of the input");
  PUMICE_CHECK(matrix.is_contiguous(), op, name, " must be contiguous");
}

inline void check_floating(const char* op, const char* name, const Tensor& tensor) {
  PUMICE_CHECK(is_floating_activation(tensor.scalar_type()), op, name,
               " must be float32, float16 or bfloat16");
}

inline void check_index(const char* op, const char* name, const Tensor& index, int64_t size,
                        const Tensor& like) {
  PUMICE_CHECK(index.dim() == 1 && (size < 0 || index.size(0) == size), op, name,
               " must be a vector of ", size, " elements (-1: any), not of ", index.numel());
  PUMICE_CHECK(index.scalar_type() == ScalarType::Int, op, name, " must be int32");
  PUMICE_CHECK(same_device(index, like), op, name, " must be on the device of the input");
  PUMICE_CHECK(index.is_contiguous(), op, name, " must be contiguous");
}

inline IntnWeight check_intn_weight(const char* op, const Tensor& qweight, const Tensor& scales,
                                    const std::optional<Tensor>& zeros,
                                    const std::optional<Tensor>& g_idx, int64_t k,
                                    int64_t group_size, int64_t bits) {
  check_bits(op, bits);
  check_group_size(op, group_size);
  PUMICE_CHECK(k >= 1, op, "K must be at least 1, not ", k);
  PUMICE_CHECK(qweight.scalar_type() == ScalarType::Int, op, "qweight must be int32");
  check_matrix(op, "qweight", qweight, -1, intn_words(k, bits), qweight);
  const int64_t n = qweight.size(0);
  PUMICE_CHECK(n >= 1, op, "qweight is empty");
  // With g_idx there may be any number of groups.
  check_matrix(op, "scales", scales, n, g_idx ? -1 : intn_groups(k, group_size), qweight);
  check_floating(op, "scales", scales);
  const int64_t groups = scales.size(1);
  PUMICE_CHECK(groups >= 1, op, "scales is empty");
  ZeroKind zero_kind = ZeroKind::kMiddle;
  if (zeros) {
    check_matrix(op, "zeros", *zeros, n, groups, qweight);
    const bool integer = zeros->scalar_type() == ScalarType::Byte;
    PUMICE_CHECK(integer || zeros->scalar_type() == scales.scalar_type(), op,
                 "zeros must be uint8 or of the dtype of scales");
    zero_kind = integer ? ZeroKind::kInteger : ZeroKind::kFloat;
  }
  if (g_idx) check_index(op, "g_idx", *g_idx, k, qweight);
  return {static_cast<const uint32_t*>(qweight.const_data_ptr()),
          scales.const_data_ptr(),
          zeros ? zeros->const_data_ptr() : nullptr,
          g_idx ? static_cast<const int32_t*>(g_idx->const_data_ptr()) : nullptr,
          to_dtype(scales.scalar_type()),
          zero_kind,
          n,
          k,
          groups,
          group_size < 0 ? k : group_size,
          static_cast<int>(bits)};
}

inline MatrixView check_factor(const char* op, const char* name, const Tensor& matrix, int64_t rows,
                               int64_t columns, const Tensor& like) {
  check_matrix(op, name, matrix, rows, columns, like);
  check_floating(op, name, matrix);
  return {matrix.const_data_ptr(), to_dtype(matrix.scalar_type()), matrix.size(0), matrix.size(1)};
}

struct Int4LinearArgs {
  Tensor x;  // contiguous, M × K
  DType dtype;
  int64_t m;
  IntnWeight weight;
  const int32_t* perm;  // [K] or null
  VectorView bias;
  const int32_t* outlier_idx;  // [outlier_weight.columns] or null
  MatrixView outlier_weight;   // [N, n_o]
  MatrixView lora_a;           // [r, K]
  MatrixView lora_b;           // [N, r]
};

inline Int4LinearArgs check_int4_linear(
    const Tensor& x, const Tensor& qweight, const Tensor& scales,
    const std::optional<Tensor>& zeros, const std::optional<Tensor>& g_idx,
    const std::optional<Tensor>& perm, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& outlier_idx, const std::optional<Tensor>& outlier_weight,
    const std::optional<Tensor>& lora_a, const std::optional<Tensor>& lora_b, int64_t group_size,
    int64_t bits) {
  const char* op = "pumice::int4_linear";
  PUMICE_CHECK(x.dim() >= 1, op, "x must have at least one dimension");
  check_floating(op, "x", x);
  PUMICE_CHECK(same_device(x, qweight), op, "qweight must be on the device of the input");
  const int64_t k = x.size(-1);
  Int4LinearArgs args{};
  args.weight = check_intn_weight(op, qweight, scales, zeros, g_idx, k, group_size, bits);
  const int64_t n = args.weight.n;
  args.x = torch::stable::contiguous(x);
  args.dtype = to_dtype(x.scalar_type());
  args.m = x.numel() / k;
  if (perm) {
    check_index(op, "perm", *perm, k, x);
    args.perm = static_cast<const int32_t*>(perm->const_data_ptr());
  }
  if (bias) check_vector(op, "bias", *bias, n, x);
  args.bias = view_of(bias);
  PUMICE_CHECK(outlier_idx.has_value() == outlier_weight.has_value(), op,
               "outlier_idx and outlier_weight belong together");
  if (outlier_idx) {
    check_index(op, "outlier_idx", *outlier_idx, -1, x);
    args.outlier_idx = static_cast<const int32_t*>(outlier_idx->const_data_ptr());
    args.outlier_weight =
        check_factor(op, "outlier_weight", *outlier_weight, n, outlier_idx->size(0), x);
  }
  PUMICE_CHECK(lora_a.has_value() == lora_b.has_value(), op, "lora_a and lora_b belong together");
  if (lora_a) {
    args.lora_a = check_factor(op, "lora_a", *lora_a, -1, k, x);
    args.lora_b = check_factor(op, "lora_b", *lora_b, n, args.lora_a.rows, x);
  }
  return args;
}

}  // namespace pumice
