// The int4 operators on CUDA: arguments, workspace and which kernels; the arithmetic is in the
// kernels.
//
// Nothing waits for the device, so that every operator can be captured in a CUDA graph, except for
// int4_pack, which is done once for a weight and refuses values that do not fit. Indices and zero
// points are not looked at before they are used, as that would mean waiting: perm, outlier_idx and
// g_idx out of range read foreign memory. pumice.nn.Int4Linear and the readers of checkpoints look
// once.
#include "common/intn_args.h"
#include "cuda/gemm/int4_dequantized.h"
#include "cuda/gemm/int4_gemm.h"
#include "cuda/quantize/int4_weight.h"
#include "cuda/tensor_access.h"
#include "cuda/workspace.h"

namespace pumice::cuda {
namespace {

using torch::stable::new_empty;

Tensor int4_pack(Tensor q, int64_t bits) {
  const char* op = "pumice::int4_pack";
  check_bits(op, bits);
  PUMICE_CHECK(q.scalar_type() == ScalarType::Byte, op, "q must be uint8");
  PUMICE_CHECK(q.dim() == 2 && q.numel() > 0, op, "q must be a matrix [N, K] that is not empty");
  const DeviceGuard guard(q);
  const cudaStream_t stream = current_stream(q);
  const int64_t n = q.size(0), k = q.size(1);
  const Tensor values = torch::stable::contiguous(q);
  Tensor qweight = new_empty(q, {n, intn_words(k, bits)}, ScalarType::Int);
  Tensor too_large = torch::stable::new_zeros(q, {1}, ScalarType::Int);
  pack_weight(read_pointer<uint8_t>(values), n, k, static_cast<int>(bits),
              write_pointer<uint32_t>(qweight), write_pointer<uint32_t>(too_large), stream);
  const Tensor on_host =
      torch::stable::to(too_large, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  PUMICE_CHECK(*static_cast<const int32_t*>(on_host.const_data_ptr()) == 0, op,
               "q holds a value that does not fit into ", bits, " bits");
  return qweight;
}

Tensor int4_unpack(Tensor qweight, int64_t k, int64_t bits) {
  const char* op = "pumice::int4_unpack";
  check_bits(op, bits);
  PUMICE_CHECK(k >= 1, op, "K must be at least 1, not ", k);
  PUMICE_CHECK(qweight.scalar_type() == ScalarType::Int, op, "qweight must be int32");
  check_matrix(op, "qweight", qweight, -1, intn_words(k, bits), qweight);
  const DeviceGuard guard(qweight);
  const int64_t n = qweight.size(0);
  Tensor q = new_empty(qweight, {n, k}, ScalarType::Byte);
  if (n > 0) {
    unpack_weight(read_pointer<uint32_t>(qweight), n, k, static_cast<int>(bits),
                  write_pointer<uint8_t>(q), current_stream(qweight));
  }
  return q;
}

Tensor int4_dequantize(Tensor qweight, Tensor scales, std::optional<Tensor> zeros,
                       std::optional<Tensor> g_idx, int64_t k, int64_t group_size, int64_t bits,
                       ScalarType out_dtype) {
  const char* op = "pumice::int4_dequantize";
  const IntnWeight checked =
      check_intn_weight(op, qweight, scales, zeros, g_idx, k, group_size, bits);
  PUMICE_CHECK(k <= INT32_MAX, op, "K must be below 2^31, not ", k);
  PUMICE_CHECK(is_floating_activation(out_dtype), op,
               "out_dtype must be float32, float16 or bfloat16");
  const DeviceGuard guard(qweight);
  Tensor out = new_empty(qweight, {checked.n, k}, out_dtype);
  dequantize_weight(device_weight(checked, qweight, scales, zeros, g_idx), write_pointer<void>(out),
                    k, to_dtype(out_dtype), current_stream(qweight));
  return out;
}

MatrixView device_matrix(MatrixView view, const std::optional<Tensor>& matrix) {
  view.data = matrix ? read_pointer<void>(*matrix) : nullptr;
  return view;
}

// For many tokens see int4_dequantized.h. Else one launch, where x can be read as it is: 16 bit, no
// perm, rows on boundaries of 16 bytes, no low-rank term; two if not, or where K is cut into parts.
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
  PUMICE_CHECK(!int8_activation, op,
               "int8_activation=True has kernels on the CPU only; pass int8_activation=False");
  const int64_t m = args.m, k = args.weight.k, n = args.weight.n;
  constexpr int64_t kMaxSize = 1 << 30;  // so that an index just beyond the end is an int, too
  PUMICE_CHECK(m <= kMaxSize && n <= kMaxSize && k <= kMaxSize, op,
               "M, N and K must be at most 2^30, not ", m, ", ", n, ", ", k);
  const DeviceGuard guard(x);
  const cudaStream_t stream = current_stream(x);
  Tensor y = new_empty(x, shape_with_last(x, n), x.scalar_type());
  if (m == 0) return y;
  const bool is_fp32 = args.dtype == DType::kFloat32;
  if (int4_dequantizes(m, is_fp32)) {
    int4_linear_dequantized(
        args,
        {qweight, scales, zeros, g_idx, perm, bias, outlier_idx, outlier_weight, lora_a, lora_b},
        y);
    return y;
  }

  const DeviceProperties& device = device_properties(x);
  const IntnWeight weight = device_weight(args.weight, qweight, scales, zeros, g_idx);
  const void* x_data = read_pointer<void>(args.x);
  const bool rewrites =
      is_fp32 || args.perm || k % 8 != 0 || reinterpret_cast<uintptr_t>(x_data) % 16 != 0;
  const int64_t stride = rewrites ? (k + 7) / 8 * 8 : k;
  const Int4Plan plan = plan_int4(m, n, k, is_fp32, int4_is_general(weight), device.sm_count,
                                  device.shared_memory_limit);
  const int64_t tickets = ticket_count(plan, m, n);

  Workspace workspace;
  const size_t high = workspace.reserve(rewrites ? m * stride * 2 : 0);
  const size_t low = workspace.reserve(is_fp32 ? m * stride * 2 : 0);
  const size_t low_rank = workspace.reserve(m * args.lora_a.rows * 4);
  const size_t partial_sums = workspace.reserve(partial_sum_bytes(plan, m, n));
  const size_t ticket_words = workspace.reserve(tickets * 4);
  workspace.allocate(x);

  Int4Preparation preparation{};
  preparation.x = x_data;
  preparation.dtype = args.dtype;
  preparation.m = m;
  preparation.k = k;
  preparation.perm = perm ? read_pointer<int32_t>(*perm) : nullptr;
  preparation.high = rewrites ? workspace.at<void>(high) : nullptr;
  preparation.low = is_fp32 ? workspace.at<void>(low) : nullptr;
  preparation.stride = stride;
  preparation.lora_a = device_matrix(args.lora_a, lora_a);
  preparation.low_rank = args.lora_a.rows ? workspace.at<float>(low_rank) : nullptr;
  preparation.tickets = tickets ? workspace.at<uint32_t>(ticket_words) : nullptr;
  preparation.ticket_count = tickets;
  if (rewrites || args.lora_a.rows) {
    int4_prepare(preparation, device.sm_count, stream);
  } else if (tickets) {
    fill_zero(preparation.tickets, static_cast<size_t>(tickets) * 4, stream);
  }

  Int4Product product{};
  product.weight = weight;
  product.tokens = rewrites ? Int4Tokens{preparation.high, preparation.low, stride}
                            : Int4Tokens{x_data, nullptr, stride};
  product.x = x_data;
  product.outlier_idx = outlier_idx ? read_pointer<int32_t>(*outlier_idx) : nullptr;
  product.outlier_weight = device_matrix(args.outlier_weight, outlier_weight);
  product.low_rank = preparation.low_rank;
  product.lora_b = device_matrix(args.lora_b, lora_b);
  product.bias = read_view(bias);
  product.y = write_pointer<void>(y);
  product.y_dtype = args.dtype;
  product.m = m;
  product.partial_sums = tickets ? workspace.at<float>(partial_sums) : nullptr;
  product.tickets = preparation.tickets;
  int4_gemm(product, plan, stream);
  return y;
}

}  // namespace

PUMICE_CUDA_IMPL(m) {
  m.impl("int4_pack", TORCH_BOX(&int4_pack));
  m.impl("int4_unpack", TORCH_BOX(&int4_unpack));
  m.impl("int4_dequantize", TORCH_BOX(&int4_dequantize));
  m.impl("int4_linear", TORCH_BOX(&int4_linear));
}

}  // namespace pumice::cuda
