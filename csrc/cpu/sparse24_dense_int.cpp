#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/sparse24_dense.h"
#include "cpu/workspace.h"

namespace pumice::cpu {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kColumnChunk = 64;            // weight rows that are decompressed at a time
constexpr int64_t kRowBlockBytes = 512 * 1024;  // of x, beside them in L2

// f(begin, end, memory) for chunks of the N columns of y, in parallel, with memory of so many bytes
// of their own.
template <typename F>
void for_chunks(int64_t n, int64_t work_of_column, int64_t bytes, const Tensor& like, const F& f) {
  const int64_t grain = ceil_div(64 * kGrain, kColumnChunk * work_of_column);
  parallel_for(0, ceil_div(n, kColumnChunk), grain, [&](int64_t begin, int64_t end) {
    Workspace workspace;
    const size_t memory = workspace.reserve<char>(bytes);
    workspace.allocate(like);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      f(chunk * kColumnChunk, std::min((chunk + 1) * kColumnChunk, n), workspace.at<char>(memory));
    }
  });
}

// The columns from n on.
VectorView columns_from(const VectorView& bias, int64_t n) {
  if (!bias.data) return bias;
  return {static_cast<const char*>(bias.data) + n * size_of(bias.dtype), bias.dtype};
}

char* column_of(Tensor& y, int64_t n) {
  return static_cast<char*>(y.mutable_data_ptr()) + n * size_of(to_dtype(y.scalar_type()));
}

}  // namespace

void multiply_decompressed(const Sparse24Int8LinearArgs& args, Tensor& y) {
  const Int8GemmKernels& kernels = int8_gemm_kernels();
  const int64_t k = args.weight.k, n = args.weight.n;
  Workspace workspace;
  const size_t prepared = workspace.reserve<char>(args.m * kernels.prepared_row_bytes(k));
  workspace.allocate(args.q);
  Int8GemmJob job{};
  job.q = args.q.const_data_ptr<int8_t>();
  job.scale = args.scale.const_data_ptr<float>();
  job.scale_stride = args.per_tensor ? 0 : 1;
  job.weight_scale_stride = args.weight_scale.numel() == 1 ? 0 : 1;
  job.y_dtype = to_dtype(y.scalar_type());
  job.y_stride = n;
  job.m = args.m;
  job.k = k;
  job.prepared = workspace.at<void>(prepared);
  for_rows(job.m, k, [&](int64_t begin, int64_t end) { kernels.prepare_rows(job, begin, end); });

  const int64_t fitting = kRowBlockBytes / kernels.streamed_row_bytes(k);
  const int64_t row_block = std::clamp(fitting / kPanelRows * kPanelRows, kPanelRows, kMaxGemmRows);
  const float* weight_scale = args.weight_scale.const_data_ptr<float>();
  for_chunks(n, job.m * k, kColumnChunk * k, args.q, [&](int64_t begin, int64_t end, char* memory) {
    sparse24_weight_kernels().decompress_rows(args.weight.values, args.weight.meta, 1, k, memory,
                                              begin, end);
    Int8GemmJob part = job;
    part.weight = reinterpret_cast<const int8_t*>(memory);
    part.weight_scale = weight_scale + begin * job.weight_scale_stride;
    part.bias = columns_from(args.bias, begin);
    part.y = column_of(y, begin);
    part.n = end - begin;
    for (int64_t m = 0; m < job.m; m += row_block) {
      kernels.gemm(part, m, std::min(m + row_block, job.m), 0, part.n);
    }
  });
}

}  // namespace pumice::cpu
