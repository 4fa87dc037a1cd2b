// The int8 operators on the CPU: arguments, workspace and threads; the arithmetic is in int8_*.cpp.
#include <algorithm>
#include <atomic>
#include <bit>
#include <limits>

#include "common/int8_args.h"
#include "cpu/dispatch.h"

namespace pumice::cpu {
namespace {

using torch::stable::new_empty;
using torch::stable::new_zeros;
using torch::stable::parallel_for;

// This many elements to quantize, or 64 times as many multiplications, are worth a thread: some 10
// µs.
constexpr int64_t kGrain = 1 << 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t rows_per_thread(int64_t k) { return std::max<int64_t>(1, kGrain / k); }

// Pieces of one uninitialised allocation, each beginning a cache line.
class Workspace {
 public:
  template <typename T>
  size_t reserve(int64_t count) {
    const size_t offset = size_;
    size_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return offset;
  }
  void allocate(const Tensor& like) {
    memory_ = new_empty(like, {static_cast<int64_t>(size_)}, ScalarType::Byte);
    base_ = static_cast<char*>(memory_.mutable_data_ptr());
  }
  template <typename T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

 private:
  size_t size_ = 0;
  Tensor memory_;
  char* base_ = nullptr;
};

void quantize_per_token(const Int8QuantizeJob& job, int64_t m) {
  const auto quantize_rows = int8_quantize_kernels().quantize_rows;
  parallel_for(0, m, rows_per_thread(job.k),
               [&](int64_t begin, int64_t end) { quantize_rows(job, begin, end); });
}

// The scale of the whole tensor from its absolute maximum; fills job.q.
float quantize_per_tensor(const Int8QuantizeJob& job, int64_t m) {
  const Int8QuantizeKernels& kernels = int8_quantize_kernels();
  std::atomic<int32_t> bits = 0;
  parallel_for(0, m, rows_per_thread(job.k), [&](int64_t begin, int64_t end) {
    const int32_t found = kernels.absmax_bits(job, begin, end);
    int32_t largest = bits.load(std::memory_order_relaxed);
    while (found > largest && !bits.compare_exchange_weak(largest, found)) {
    }
  });
  const float absmax = std::bit_cast<float>(bits.load());
  const bool finite = absmax <= std::numeric_limits<float>::max();
  const float inverse = finite ? int8_inverse_scale(absmax) : 0.0f;
  parallel_for(0, m, rows_per_thread(job.k), [&](int64_t begin, int64_t end) {
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
  const Int8QuantizeJob job{
      args.x.const_data_ptr(),
      args.dtype,
      args.k,
      args.smooth ? args.smooth->const_data_ptr<float>() : nullptr,
      args.has_threshold,
      args.threshold,
      q.mutable_data_ptr<int8_t>(),
      scale_data,
      args.has_threshold ? static_cast<uint8_t*>(outliers.mutable_data_ptr()) : nullptr};
  if (args.static_scale) {
    *scale_data = *args.static_scale->const_data_ptr<float>();
    const float inverse = 1.0f / *scale_data;
    parallel_for(0, args.m, rows_per_thread(args.k), [&](int64_t begin, int64_t end) {
      int8_quantize_kernels().round_rows(job, inverse, begin, end);
    });
  } else if (per_tensor) {
    *scale_data = quantize_per_tensor(job, args.m);
  } else {
    quantize_per_token(job, args.m);
  }
  return {q, scales, outliers};
}

// Fills in job.prepared, which must be allocated, and multiplies: blocks of rows that fit into L2
// times chunks of columns, spread over the threads.
void run_gemm(const Int8GemmJob& job) {
  constexpr int64_t kColumnChunk = 64;
  constexpr int64_t kRowBlockBytes = 512 * 1024;
  const Int8GemmKernels& kernels = int8_gemm_kernels();
  parallel_for(0, job.m, rows_per_thread(job.k),
               [&](int64_t begin, int64_t end) { kernels.prepare_rows(job, begin, end); });

  const int64_t fitting = kRowBlockBytes / kernels.row_bytes(job.k) / kPanelRows * kPanelRows;
  const int64_t row_block = std::clamp(fitting, kPanelRows, kMaxGemmRows);
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
  Workspace workspace;
  const size_t prepared =
      workspace.reserve<char>(int8_gemm_kernels().prepared_bytes(args.m, args.weight.k));
  workspace.allocate(q);

  Int8GemmJob job = gemm_job(args.weight, args.m, y, to_dtype(out_dtype));
  job.q = args.q.const_data_ptr<int8_t>();
  job.scale = args.scale.const_data_ptr<float>();
  job.scale_stride = args.per_tensor ? 0 : 1;
  job.prepared = workspace.at<void>(prepared);
  run_gemm(job);
  return y;
}

Tensor int8_mixed_linear(Tensor x, Tensor qweight, Tensor weight_scale, std::optional<Tensor> bias,
                         double threshold, bool per_element) {
  const Int8MixedArgs args = check_int8_mixed_linear(x, qweight, weight_scale, bias, threshold);
  const int64_t m = args.m, k = args.weight.k;
  Tensor y = new_empty(x, shape_with_last(x, args.weight.n), x.scalar_type());
  if (m == 0) return y;
  Workspace workspace;
  const size_t q = workspace.reserve<int8_t>(m * k);
  const size_t scale = workspace.reserve<float>(m);
  const size_t flags = workspace.reserve<uint8_t>(k);
  const size_t columns = workspace.reserve<int32_t>(k);
  const size_t prepared = workspace.reserve<char>(int8_gemm_kernels().prepared_bytes(m, k));
  workspace.allocate(x);

  std::fill_n(workspace.at<uint8_t>(flags), k, uint8_t{0});
  const Int8QuantizeJob quantize{args.x.const_data_ptr(),
                                 args.dtype,
                                 k,
                                 nullptr,
                                 true,
                                 args.threshold,
                                 workspace.at<int8_t>(q),
                                 workspace.at<float>(scale),
                                 workspace.at<uint8_t>(flags)};
  quantize_per_token(quantize, m);

  Int8GemmJob job = gemm_job(args.weight, m, y, args.dtype);
  job.q = quantize.q;
  job.scale = quantize.scale;
  job.scale_stride = 1;
  job.prepared = workspace.at<void>(prepared);

  int32_t* column_list = workspace.at<int32_t>(columns);
  for (int64_t column = 0; column < k; ++column) {
    column_list[job.outlier_count] = static_cast<int32_t>(column);
    job.outlier_count += quantize.outliers[column];
  }
  job.outlier_columns = column_list;

  Workspace residual_workspace;
  if (job.outlier_count) {
    const int64_t panels = ceil_div(m, kPanelRows);
    const size_t residual =
        residual_workspace.reserve<float>(panels * kPanelRows * job.outlier_count);
    residual_workspace.allocate(x);
    job.residual = residual_workspace.at<float>(residual);
    const ResidualJob residuals{quantize,    m,
                                column_list, job.outlier_count,
                                per_element, residual_workspace.at<float>(residual)};
    parallel_for(0, panels, rows_per_thread(job.outlier_count * kPanelRows),
                 [&](int64_t begin, int64_t end) {
                   int8_quantize_kernels().residual_panels(residuals, begin, end);
                 });
  }
  run_gemm(job);
  return y;
}

}  // namespace

PUMICE_CPU_IMPL(m) {
  m.impl("int8_quantize", TORCH_BOX(&int8_quantize));
  m.impl("int8_linear", TORCH_BOX(&int8_linear));
  m.impl("int8_mixed_linear", TORCH_BOX(&int8_mixed_linear));
}

}  // namespace pumice::cpu
