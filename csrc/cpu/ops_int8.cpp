// The int8 operators on the CPU: arguments, workspace and threads; the arithmetic is in int8_*.cpp.
#include <algorithm>
#include <atomic>
#include <bit>
#include <limits>

#include "common/int8_args.h"
#include "cpu/dispatch.h"
#include "cpu/workspace.h"

namespace pumice::cpu {
namespace {

using torch::stable::new_empty;
using torch::stable::new_zeros;
using torch::stable::parallel_for;

// The scale of the whole tensor from its absolute maximum; fills job.q.
float quantize_per_tensor(const Int8QuantizeJob& job, int64_t m) {
  const Int8QuantizeKernels& kernels = int8_quantize_kernels();
  std::atomic<int32_t> bits = 0;
  for_rows(m, job.k, [&](int64_t begin, int64_t end) {
    const int32_t found = kernels.absmax_bits(job, begin, end);
    int32_t largest = bits.load(std::memory_order_relaxed);
    while (found > largest && !bits.compare_exchange_weak(largest, found)) {
    }
  });
  const float absmax = std::bit_cast<float>(bits.load());
  const bool finite = absmax <= std::numeric_limits<float>::max();
  const float inverse = finite ? int8_inverse_scale(absmax) : 0.0f;
  for_rows(m, job.k, [&](int64_t begin, int64_t end) {
    if (finite) {
      kernels.round_rows(job, inverse, begin, end);
    } else {
      std::fill(job.q + begin * job.k, job.q + end * job.k, int8_t{0});
    }
  });
  return finite ? int8_scale(absmax) : std::numeric_limits<float>::quiet_NaN();
}

std::tuple<Tensor, Tensor, Tensor> int8_quantize(Tensor x, bool per_tensor,
                                                 std::optional<double> threshold,
                                                 std::optional<Tensor> smooth,
                                                 std::optional<Tensor> scale) {
  const Int8QuantizeArgs args = check_int8_quantize(x, per_tensor, threshold, smooth, scale);
  Tensor q = new_empty(x, x.sizes(), ScalarType::Char);
  Tensor outliers = new_zeros(x, {args.k}, ScalarType::Bool);
  Tensor scales = per_tensor ? new_empty(x, {1}, ScalarType::Float)
                             : new_empty(x, leading_shape(x), ScalarType::Float);
  float* scale_data = scales.mutable_data_ptr<float>();
  Int8QuantizeJob job{};
  job.x = args.x.const_data_ptr();
  job.dtype = args.dtype;
  job.k = args.k;
  job.smooth = args.smooth ? args.smooth->const_data_ptr<float>() : nullptr;
  job.has_threshold = args.has_threshold;
  job.threshold = args.threshold;
  job.q = q.mutable_data_ptr<int8_t>();
  job.scale = scale_data;
  job.outliers = args.has_threshold ? static_cast<uint8_t*>(outliers.mutable_data_ptr()) : nullptr;
  if (args.static_scale) {
    *scale_data = *args.static_scale->const_data_ptr<float>();
    const float inverse = 1.0f / *scale_data;
    for_rows(args.m, args.k, [&](int64_t begin, int64_t end) {
      int8_quantize_kernels().round_rows(job, inverse, begin, end);
    });
  } else if (per_tensor) {
    *scale_data = quantize_per_tensor(job, args.m);
  } else {
    for_rows(args.m, args.k, [&](int64_t begin, int64_t end) {
      int8_quantize_kernels().quantize_rows(job, begin, end);
    });
  }
  return {q, scales, outliers};
}

// Blocks of rows that fit into L2 times chunks of columns, spread over the threads.
void multiply(const Int8GemmJob& job) {
  constexpr int64_t kColumnChunk = 64;
  constexpr int64_t kRowBlockBytes = 512 * 1024;
  const Int8GemmKernels& kernels = int8_gemm_kernels();
  const int64_t fitting = kRowBlockBytes / kernels.streamed_row_bytes(job.k);
  const int64_t row_block = std::clamp(fitting / kPanelRows * kPanelRows, kPanelRows, kMaxGemmRows);
  const int64_t column_chunks = ceil_div(job.n, kColumnChunk);
  const int64_t blocks = ceil_div(job.m, row_block) * column_chunks;
  const int64_t block_work = std::min(job.m, row_block) * kColumnChunk * job.k;
  parallel_for(0, blocks, ceil_div(64 * kGrain, block_work), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t m = block / column_chunks * row_block;
      const int64_t n = block % column_chunks * kColumnChunk;
      kernels.gemm(job, m, std::min(m + row_block, job.m), n, std::min(n + kColumnChunk, job.n));
    }
  });
}

Int8GemmJob gemm_job(const Int8WeightArgs& weight, int64_t m, Tensor& y, DType y_dtype) {
  Int8GemmJob job{};
  job.weight = weight.qweight.const_data_ptr<int8_t>();
  job.weight_scale = weight.scale.const_data_ptr<float>();
  job.weight_scale_stride = weight.scale.numel() == 1 ? 0 : 1;
  job.bias = weight.bias;
  job.y = y.mutable_data_ptr();
  job.y_dtype = y_dtype;
  job.y_stride = weight.n;
  job.m = m;
  job.n = weight.n;
  job.k = weight.k;
  return job;
}

Tensor int8_linear(Tensor q, Tensor scale, Tensor qweight, Tensor weight_scale,
                   std::optional<Tensor> bias, ScalarType out_dtype) {
  const Int8LinearArgs args = check_int8_linear(q, scale, qweight, weight_scale, bias, out_dtype);
  Tensor y = new_empty(q, shape_with_last(q, args.weight.n), out_dtype);
  if (args.m == 0) return y;
  const Int8GemmKernels& kernels = int8_gemm_kernels();
  Workspace workspace;
  const size_t prepared =
      workspace.reserve<char>(args.m * kernels.prepared_row_bytes(args.weight.k));
  workspace.allocate(q);

  Int8GemmJob job = gemm_job(args.weight, args.m, y, to_dtype(out_dtype));
  job.q = args.q.const_data_ptr<int8_t>();
  job.scale = args.scale.const_data_ptr<float>();
  job.scale_stride = args.per_tensor ? 0 : 1;
  job.prepared = workspace.at<void>(prepared);
  for_rows(job.m, job.k,
           [&](int64_t begin, int64_t end) { kernels.prepare_rows(job, begin, end); });
  multiply(job);
  return y;
}

// The columns with a flag set, in order; returns how many.
int64_t list_columns(const uint8_t* flags, int64_t k, int32_t* columns) {
  int64_t count = 0;
  for (int64_t column = 0; column < k; ++column) {
    columns[count] = static_cast<int32_t>(column);  // overwritten by the next, unless it counts
    count += flags[column];
  }
  return count;
}

Tensor int8_mixed_linear(Tensor x, Tensor qweight, Tensor weight_scale, std::optional<Tensor> bias,
                         double threshold, bool per_element) {
  const Int8MixedArgs args = check_int8_mixed_linear(x, qweight, weight_scale, bias, threshold);
  const int64_t m = args.m, k = args.weight.k;
  Tensor y = new_empty(x, shape_with_last(x, args.weight.n), x.scalar_type());
  if (m == 0) return y;
  const Int8QuantizeKernels& quantize_kernels = int8_quantize_kernels();
  const Int8GemmKernels& gemm_kernels = int8_gemm_kernels();
  Workspace workspace;
  const size_t q = workspace.reserve<int8_t>(m * k);
  const size_t scale = workspace.reserve<float>(m);
  const size_t flags = workspace.reserve<uint8_t>(k);
  const size_t columns = workspace.reserve<int32_t>(k);
  const size_t prepared = workspace.reserve<char>(m * gemm_kernels.prepared_row_bytes(k));
  workspace.allocate(x);

  Int8QuantizeJob quantize{};
  quantize.x = args.x.const_data_ptr();
  quantize.dtype = args.dtype;
  quantize.k = k;
  quantize.has_threshold = true;
  quantize.threshold = args.threshold;
  quantize.q = workspace.at<int8_t>(q);
  quantize.scale = workspace.at<float>(scale);
  quantize.outliers = workspace.at<uint8_t>(flags);
  std::fill_n(quantize.outliers, k, uint8_t{0});

  Int8GemmJob job = gemm_job(args.weight, m, y, args.dtype);
  job.q = quantize.q;
  job.scale = quantize.scale;
  job.scale_stride = 1;
  job.prepared = workspace.at<void>(prepared);
  for_rows(m, k, [&](int64_t begin, int64_t end) {
    quantize_kernels.quantize_rows(quantize, begin, end);
    gemm_kernels.prepare_rows(job, begin, end);
  });

  int32_t* outlier_columns = workspace.at<int32_t>(columns);
  job.outlier_columns = outlier_columns;
  job.outlier_count = list_columns(quantize.outliers, k, outlier_columns);
  Workspace residual_workspace;  // its size is known only now
  if (job.outlier_count) {
    const int64_t panels = ceil_div(m, kPanelRows);
    const size_t residual =
        residual_workspace.reserve<float>(panels * kPanelRows * job.outlier_count);
    residual_workspace.allocate(x);
    const ResidualJob residuals{quantize,        m,
                                outlier_columns, job.outlier_count,
                                per_element,     residual_workspace.at<float>(residual)};
    for_rows(panels, kPanelRows * job.outlier_count, [&](int64_t begin, int64_t end) {
      quantize_kernels.residual_panels(residuals, begin, end);
    });
    job.residual = residuals.residual;
  }
  multiply(job);
  return y;
}

}  // namespace

PUMICE_CPU_IMPL(m) {
  m.impl("int8_quantize", TORCH_BOX(&int8_quantize));
  m.impl("int8_linear", TORCH_BOX(&int8_linear));
  m.impl("int8_mixed_linear", TORCH_BOX(&int8_mixed_linear));
}

}  // namespace pumice::cpu
