// The int8 operators on CUDA: arguments, workspace and which kernels; the arithmetic is in the
// kernels. Nothing here waits for the device, so every operator can be captured in a CUDA graph.
#include <algorithm>
#include <limits>

#include "common/int8_args.h"
#include "cuda/gemm/int8_gemm.h"
#include "cuda/quantize/int8_quantize.h"
#include "cuda/tensor_access.h"
#include "cuda/workspace.h"

namespace pumice::cuda {
namespace {

using torch::stable::new_empty;

Int8Device int8_device(const Tensor& tensor) {
  const DeviceProperties& properties = device_properties(tensor);
  return {properties.sm_count, properties.shared_memory_limit};
}

Int8Product int8_product(const Int8WeightArgs& weight, const std::optional<Tensor>& bias, int64_t m,
                         const Tensor& y, DType y_dtype) {
  return {read_pointer<int8_t>(weight.qweight),
          read_pointer<float>(weight.scale),
          weight.scale.numel() == 1 ? 0 : 1,
          read_view(bias),
          write_pointer<void>(y),
          y_dtype,
          m,
          weight.n,
          weight.k};
}

std::tuple<Tensor, Tensor, Tensor> int8_quantize(Tensor x, bool per_tensor,
                                                 std::optional<double> threshold,
                                                 std::optional<Tensor> smooth,
                                                 std::optional<Tensor> scale) {
  const Int8QuantizeArgs args = check_int8_quantize(x, per_tensor, threshold, smooth, scale);
  const DeviceGuard guard(x);
  const cudaStream_t stream = current_stream(x);
  const Int8Device device = int8_device(x);
  Tensor q = new_empty(x, x.sizes(), ScalarType::Char);
  Tensor outliers = new_empty(x, {args.k}, ScalarType::Bool);
  Tensor scales = per_tensor ? new_empty(x, {1}, ScalarType::Float)
                             : new_empty(x, leading_shape(x), ScalarType::Float);

  // An empty tensor still has a scale (0) if that is one for the tensor: a block that finds no row.
  const int64_t rows_at_least_one = std::max<int64_t>(args.m, 1);
  const int blocks =
      per_tensor ? static_cast<int>(std::min<int64_t>(rows_at_least_one, 8 * device.sm_count))
                 : int8_rows_blocks(rows_at_least_one, device.sm_count);
  Workspace workspace;
  const size_t masks = workspace.reserve(args.has_threshold ? blocks * mask_words(args.k) * 4 : 0);
  const size_t absmax = workspace.reserve(per_tensor && !args.static_scale ? blocks * 4 : 0);
  workspace.allocate(x);

  const Int8Rows rows = {
      args.m == 0 ? nullptr : read_pointer<void>(args.x),
      args.dtype,
      args.m,
      args.k,
      args.smooth ? read_pointer<float>(*args.smooth) : nullptr,
      args.has_threshold ? args.threshold : std::numeric_limits<float>::infinity(),
      args.has_threshold,
      args.m == 0 ? nullptr : write_pointer<int8_t>(q),
      args.k,
      args.has_threshold ? workspace.at<uint32_t>(masks) : nullptr,
      nullptr,
      0};
  if (args.static_scale) {
    int8_quantize_static(rows, read_pointer<float>(*args.static_scale),
                         write_pointer<float>(scales), blocks, stream);
  } else if (per_tensor) {
    int8_quantize_tensor(rows, write_pointer<float>(scales), workspace.at<uint32_t>(absmax), blocks,
                         stream);
  } else if (args.m > 0) {
    int8_quantize_rows(rows, write_pointer<float>(scales), nullptr, blocks,
                       device.shared_memory_limit, stream);
  }
  if (args.has_threshold && (per_tensor || args.m > 0)) {
    collect_outlier_columns(rows.partial_masks, blocks, args.k, write_pointer<bool>(outliers),
                            stream);
  } else {
    fill_zero(write_pointer<bool>(outliers), static_cast<size_t>(args.k), stream);
  }
  return {q, scales, outliers};
}

Tensor int8_linear(Tensor q, Tensor scale, Tensor qweight, Tensor weight_scale,
                   std::optional<Tensor> bias, ScalarType out_dtype) {
  const Int8LinearArgs args = check_int8_linear(q, scale, qweight, weight_scale, bias, out_dtype);
  const DeviceGuard guard(q);
  Tensor y = new_empty(q, shape_with_last(q, args.weight.n), out_dtype);
  if (args.m == 0) return y;
  const Int8Product product = int8_product(args.weight, bias, args.m, y, to_dtype(out_dtype));
  const Int8Tokens tokens = {read_pointer<int8_t>(args.q), args.weight.k,
                             read_pointer<float>(args.scale), args.per_tensor ? 0 : 1};
  const Int8Device device = int8_device(q);
  const cudaStream_t stream = current_stream(q);
  if (args.m <= kSmallM) {
    int8_small_m(product, tokens, device, stream);
    return y;
  }
  const Int8GemmSetup setup = plan_int8_gemm(product, tokens.q, tokens.stride, false, device);
  Workspace workspace;
  const size_t partial_sums = workspace.reserve(setup.partial_bytes);
  const size_t tickets = workspace.reserve(setup.tickets * 4);
  workspace.allocate(q);
  if (setup.tickets) {
    fill_zero(workspace.at<uint32_t>(tickets), static_cast<size_t>(setup.tickets) * 4, stream);
  }
  int8_gemm(product, tokens, Int8Outliers{}, setup, workspace.at<int32_t>(partial_sums),
            workspace.at<uint32_t>(tickets), device, stream);
  return y;
}

Tensor int8_mixed_linear(Tensor x, Tensor qweight, Tensor weight_scale, std::optional<Tensor> bias,
                         double threshold, bool per_element) {
  const Int8MixedArgs args = check_int8_mixed_linear(x, qweight, weight_scale, bias, threshold);
  const DeviceGuard guard(x);
  const int64_t m = args.m, k = args.weight.k;
  Tensor y = new_empty(x, shape_with_last(x, args.weight.n), x.scalar_type());
  if (m == 0) return y;
  const cudaStream_t stream = current_stream(x);
  const Int8Device device = int8_device(x);
  const Int8Product product = int8_product(args.weight, bias, m, y, args.dtype);
  const void* x_data = read_pointer<void>(args.x);
  if (m <= kSmallM) {
    int8_small_m(product, x_data, args.dtype, device, stream);
    return y;
  }

  const int64_t q_stride = (k + 15) / 16 * 16;  // so that any K can be copied 16 bytes at a time
  const int blocks = int8_rows_blocks(m, device.sm_count);
  Workspace workspace;
  const size_t q = workspace.reserve(m * q_stride);
  const size_t scale = workspace.reserve(m * 4);
  const size_t inverse_scale = workspace.reserve(m * 4);
  const size_t masks = workspace.reserve(blocks * mask_words(k) * 4);
  // The workspace's pieces are aligned like the null pointer.
  const Int8GemmSetup setup = plan_int8_gemm(product, nullptr, q_stride, true, device);
  const size_t partial_sums = workspace.reserve(setup.partial_bytes);
  const size_t tickets = workspace.reserve(setup.tickets * 4);
  workspace.allocate(x);

  const Int8Rows rows = {x_data,
                         args.dtype,
                         m,
                         k,
                         nullptr,
                         args.threshold,
                         true,
                         workspace.at<int8_t>(q),
                         q_stride,
                         workspace.at<uint32_t>(masks),
                         workspace.at<uint32_t>(tickets),
                         setup.tickets};
  int8_quantize_rows(rows, workspace.at<float>(scale), workspace.at<float>(inverse_scale), blocks,
                     device.shared_memory_limit, stream);
  const Int8Tokens tokens = {rows.q, q_stride, workspace.at<float>(scale), 1};
  const Int8Outliers outliers = {
      x_data, workspace.at<float>(inverse_scale), args.threshold, per_element, rows.partial_masks,
      blocks, static_cast<int>(mask_words(k))};
  int8_gemm(product, tokens, outliers, setup, workspace.at<int32_t>(partial_sums),
            workspace.at<uint32_t>(tickets), device, stream);
  return y;
}

}  // namespace

PUMICE_CUDA_IMPL(m) {
  m.impl("int8_quantize", TORCH_BOX(&int8_quantize));
  m.impl("int8_linear", TORCH_BOX(&int8_linear));
  m.impl("int8_mixed_linear", TORCH_BOX(&int8_mixed_linear));
}

}  // namespace pumice::cuda
