// The int4 operators on CUDA: arguments, workspace and which kernels; the arithmetic is in the
// kernels.
//
// Nothing waits for the device, so that every operator can be captured in a CUDA graph, except for
// int4_pack, which is done once for a weight and refuses values that do not fit. Indices and zero
// points are not looked at before they are used, as that would mean waiting: perm, outlier_idx and
// g_idx out of range read foreign memory.
#include "common/intn_args.h"
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

// The checked weight with pointers for kernels.
IntnWeight device_weight(IntnWeight weight, const Tensor& qweight, const Tensor& scales,
                         const std::optional<Tensor>& zeros, const std::optional<Tensor>& g_idx) {
  weight.qweight = read_pointer<uint32_t>(qweight);
  weight.scales = read_pointer<void>(scales);
  weight.zeros = zeros ? read_pointer<void>(*zeros) : nullptr;
  weight.g_idx = g_idx ? read_pointer<int32_t>(*g_idx) : nullptr;
  return weight;
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
                    to_dtype(out_dtype), current_stream(qweight));
  return out;
}

}  // namespace

PUMICE_CUDA_IMPL(m) {
  m.impl("int4_pack", TORCH_BOX(&int4_pack));
  m.impl("int4_unpack", TORCH_BOX(&int4_unpack));
  m.impl("int4_dequantize", TORCH_BOX(&int4_dequantize));
}

}  // namespace pumice::cuda
