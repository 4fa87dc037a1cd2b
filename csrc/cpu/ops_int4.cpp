// The int4 operators on the CPU: arguments, workspace and threads; the arithmetic is in int4_*.cpp.
#include <algorithm>
#include <atomic>
#include <vector>

#include "common/intn_args.h"
#include "cpu/dispatch.h"
#include "cpu/workspace.h"

namespace pumice::cpu {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

// Kernels use these as addresses, so they are looked at first.
void check_range(const char* op, const char* name, const int32_t* index, int64_t size,
                 int64_t limit) {
  if (!index) return;
  const auto [least, greatest] = std::minmax_element(index, index + size);
  PUMICE_CHECK(size == 0 || (*least >= 0 && *greatest < limit), op, name, " must lie in [0, ",
               limit, "), but holds ", *least < 0 ? *least : *greatest);
}

void check_zeros(const char* op, const IntnWeight& weight) {
  if (weight.zero_kind != ZeroKind::kInteger) return;
  const auto* zeros = static_cast<const uint8_t*>(weight.zeros);
  uint8_t greatest = 0;
  for (int64_t i = 0; i < weight.n * weight.groups; ++i) greatest = std::max(greatest, zeros[i]);
  PUMICE_CHECK(greatest < (1 << weight.bits), op, "zeros must be below 2^bits = ", 1 << weight.bits,
               ", but hold ", int{greatest});
}

Tensor int4_pack(Tensor q, int64_t bits) {
  const char* op = "pumice::int4_pack";
  check_bits(op, bits);
  PUMICE_CHECK(q.scalar_type() == ScalarType::Byte, op, "q must be uint8");
  PUMICE_CHECK(q.dim() == 2 && q.numel() > 0, op, "q must be a matrix [N, K] that is not empty");
  const int64_t n = q.size(0), k = q.size(1);
  const Tensor values = torch::stable::contiguous(q);
  Tensor qweight = new_empty(q, {n, intn_words(k, bits)}, ScalarType::Int);
  std::atomic<bool> fits = true;
  for_rows(n, k, [&](int64_t begin, int64_t end) {
    auto* words = static_cast<uint32_t*>(qweight.mutable_data_ptr());
    if (!int4_weight_kernels().pack_rows(values.const_data_ptr<uint8_t>(), k,
                                         static_cast<int>(bits), words, begin, end)) {
      fits = false;
    }
  });
  PUMICE_CHECK(fits, op, "q holds a value that does not fit into ", bits, " bits");
  return qweight;
}

Tensor int4_unpack(Tensor qweight, int64_t k, int64_t bits) {
  const char* op = "pumice::int4_unpack";
  check_bits(op, bits);
  PUMICE_CHECK(k >= 1, op, "K must be at least 1, not ", k);
  PUMICE_CHECK(qweight.scalar_type() == ScalarType::Int, op, "qweight must be int32");
  check_matrix(op, "qweight", qweight, -1, intn_words(k, bits), qweight);
  const int64_t n = qweight.size(0);
  Tensor q = new_empty(qweight, {n, k}, ScalarType::Byte);
  for_rows(n, k, [&](int64_t begin, int64_t end) {
    int4_weight_kernels().unpack_rows(static_cast<const uint32_t*>(qweight.const_data_ptr()), k,
                                      static_cast<int>(bits), q.mutable_data_ptr<uint8_t>(), begin,
                                      end);
  });
  return q;
}

IntnWeight checked_weight(const char* op, const IntnWeight& weight) {
  check_range(op, "g_idx", weight.g_idx, weight.k, weight.groups);
  check_zeros(op, weight);
  return weight;
}

Tensor int4_dequantize(Tensor qweight, Tensor scales, std::optional<Tensor> zeros,
                       std::optional<Tensor> g_idx, int64_t k, int64_t group_size, int64_t bits,
                       ScalarType out_dtype) {
  const char* op = "pumice::int4_dequantize";
  const IntnWeight weight =
      checked_weight(op, check_intn_weight(op, qweight, scales, zeros, g_idx, k, group_size, bits));
  PUMICE_CHECK(is_floating_activation(out_dtype), op,
               "out_dtype must be float32, float16 or bfloat16");
  Tensor out = new_empty(qweight, {weight.n, k}, out_dtype);
  for_rows(weight.n, k, [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(k));
    int4_weight_kernels().dequantize_rows(weight, out.mutable_data_ptr(), to_dtype(out_dtype),
                                          row.data(), begin, end);
  });
  return out;
}

float element(const void* data, DType dtype, int64_t i) {
  float value;
  int4_gemm_kernels().gather_rows(static_cast<const char*>(data) + i * size_of(dtype), dtype, 1,
                                  nullptr, &value, 0, 1);
  return value;
}

// extra[m] = (x[m, outlier_idx], x[m] · lora_a^T): what the dense terms multiply.
void fill_extra(const Int4LinearArgs& args, float* extra) {
  const int64_t k = args.weight.k, outliers = args.outlier_weight.columns;
  const int64_t rank = args.lora_a.rows;
  for (int64_t m = 0; m < args.m; ++m) {
    float* row = extra + m * (outliers + rank);
    for (int64_t j = 0; j < outliers; ++j) {
      row[j] = element(args.x.const_data_ptr(), args.dtype, m * k + args.outlier_idx[j]);
    }
    for (int64_t r = 0; r < rank; ++r) {
      float sum = 0.0f;
      for (int64_t i = 0; i < k; ++i) {
        sum += element(args.x.const_data_ptr(), args.dtype, m * k + i) *
               element(args.lora_a.data, args.lora_a.dtype, r * k + i);
      }
      row[outliers + r] = sum;
    }
  }
}

Tensor int4_linear(Tensor x, Tensor qweight, Tensor scales, std::optional<Tensor> zeros,
                   std::optional<Tensor> g_idx, std::optional<Tensor> perm,
                   std::optional<Tensor> bias, std::optional<Tensor> outlier_idx,
                   std::optional<Tensor> outlier_weight, std::optional<Tensor> lora_a,
                   std::optional<Tensor> lora_b, int64_t group_size, int64_t bits,
                   bool int8_activation) {
  const char* op = "pumice::int4_linear";
  const Int4LinearArgs args =
      check_int4_linear(x, qweight, scales, zeros, g_idx, perm, bias, outlier_idx, outlier_weight,
                        lora_a, lora_b, group_size, bits);
  checked_weight(op, args.weight);
  const int64_t m = args.m, k = args.weight.k, n = args.weight.n;
  const int64_t outliers = args.outlier_weight.columns;
  check_range(op, "perm", args.perm, k, k);
  check_range(op, "outlier_idx", args.outlier_idx, outliers, k);
  Tensor y = new_empty(x, shape_with_last(x, n), x.scalar_type());
  if (m == 0) return y;

  const Int4GemmKernels& kernels = int4_gemm_kernels();
  const int64_t extras = outliers + args.lora_a.rows;
  std::vector<float> extra(static_cast<size_t>(m * extras));
  fill_extra(args, extra.data());
  Workspace workspace;
  const size_t gathered = workspace.reserve<float>(m * k);
  workspace.allocate(x);
  float* activations = workspace.at<float>(gathered);
  std::vector<bool> is_outlier(static_cast<size_t>(int8_activation ? k : 0));
  if (int8_activation) {
    for (int64_t j = 0; j < outliers; ++j) is_outlier[args.outlier_idx[j]] = true;
  }
  for_rows(m, k, [&](int64_t begin, int64_t end) {
    kernels.gather_rows(args.x.const_data_ptr(), args.dtype, k, args.perm, activations, begin, end);
    if (!int8_activation) return;
    for (int64_t i = 0; i < k; ++i) {
      if (!is_outlier[args.perm ? args.perm[i] : i]) continue;
      for (int64_t row = begin; row < end; ++row) activations[row * k + i] = 0.0f;
    }
    kernels.round_rows(activations, k, begin, end);
  });
  const Int4GemmJob job{args.weight,  activations,          m,
                        extra.data(), args.outlier_weight,  args.lora_b,
                        args.bias,    y.mutable_data_ptr(), args.dtype};
  parallel_for(0, n, std::max<int64_t>(1, 64 * kGrain / (m * k)), [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(k + extras));
    kernels.gemm(job, row.data(), begin, end);
  });
  return y;
}

}  // namespace

PUMICE_CPU_IMPL(m) {
  m.impl("int4_pack", TORCH_BOX(&int4_pack));
  m.impl("int4_unpack", TORCH_BOX(&int4_unpack));
  m.impl("int4_dequantize", TORCH_BOX(&int4_dequantize));
  m.impl("int4_linear", TORCH_BOX(&int4_linear));
}

}  // namespace pumice::cpu
