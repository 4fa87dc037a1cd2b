// The 2:4 operators on the CPU: arguments, workspace and threads; the arithmetic is in
// sparse24_*.cpp and, where those have no panels, in the dense kernels (sparse24_dense.h).
#include <algorithm>
#include <atomic>

#include "common/sparse24_args.h"
#include "cpu/dispatch.h"
#include "cpu/int4_operator.h"
#include "cpu/sparse24_dense.h"
#include "cpu/workspace.h"

namespace pumice::cpu {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

std::tuple<Tensor, Tensor> sparse24_compress(Tensor w) {
  const char* op = "pumice::sparse24_compress";
  const Sparse24DenseArgs args = check_sparse24_dense(op, w);
  const int64_t n = args.n, k = args.k, groups = k / kSparse24Group;
  Tensor values = new_empty(w, {n, k / 2});
  Tensor meta = new_empty(w, {n, sparse24_meta_bytes(k)}, ScalarType::Byte);
  const ScalarType dtype = w.scalar_type();
  std::atomic<int64_t> refused = n * groups;  // the first group, counted over all rows
  for_rows(n, k, [&](int64_t begin, int64_t end) {
    int64_t group = 0;
    const int64_t row = sparse24_weight_kernels().compress_rows(
        args.dense.const_data_ptr(), element_bytes(dtype), dtype != ScalarType::Char, k,
        values.mutable_data_ptr(), meta.mutable_data_ptr<uint8_t>(), begin, end, &group);
    if (row == end) return;
    const int64_t found = row * groups + group;
    int64_t least = refused.load();
    while (found < least && !refused.compare_exchange_weak(least, found)) {
    }
  });
  const int64_t row = refused / groups, group = refused % groups;
  PUMICE_CHECK(row == n, op, "w is not 2:4: row ", row, ", group ", group, " (columns ", 4 * group,
               " to ", 4 * group + 3, ") holds more than two nonzeros");
  return {values, meta};
}

Tensor sparse24_gather(Tensor w, Tensor meta) {
  const char* op = "pumice::sparse24_gather";
  const Sparse24DenseArgs args = check_sparse24_dense(op, w);
  const uint8_t* places = check_sparse24_meta(op, meta, args.n, args.k, w);
  Tensor values = new_empty(w, {args.n, args.k / 2});
  for_rows(args.n, args.k, [&](int64_t begin, int64_t end) {
    sparse24_weight_kernels().gather_rows(args.dense.const_data_ptr(), places,
                                          element_bytes(w.scalar_type()), args.k,
                                          values.mutable_data_ptr(), begin, end);
  });
  return values;
}

Tensor sparse24_decompress(Tensor values, Tensor meta) {
  const Sparse24Weight weight = check_sparse24_weight("pumice::sparse24_decompress", values, meta);
  Tensor w = new_empty(values, {weight.n, weight.k});
  decompress_rows(weight, element_bytes(values.scalar_type()), w.mutable_data_ptr(), 0, weight.n);
  return w;
}

// f(begin, end) on ranges of the N columns of y, whole tiles of four, in parallel.
template <typename F>
void for_columns(int64_t n, int64_t work_of_column, const F& f) {
  constexpr int64_t kColumns = 16;
  const int64_t grain = ceil_div(64 * kGrain, kColumns * work_of_column);
  parallel_for(0, ceil_div(n, kColumns), grain, [&](int64_t begin, int64_t end) {
    f(begin * kColumns, std::min(end * kColumns, n));
  });
}

Sparse24FloatJob job_of(const Sparse24LinearArgs& args, void* prepared, Tensor& y) {
  return {args.x.const_data_ptr(),
          args.weight.values,
          args.weight.meta,
          args.dtype,
          args.bias,
          y.mutable_data_ptr(),
          args.m,
          args.weight.n,
          args.weight.k,
          prepared};
}

void few_rows(const Sparse24LinearArgs& args, Tensor& y) {
  const Sparse24FloatKernels& kernels = sparse24_float_kernels();
  const int64_t k = args.weight.k, row = kernels.prepared_row(k);
  Workspace workspace;
  const size_t prepared = workspace.reserve<float>(args.m * row);
  const size_t scratch = workspace.reserve<float>(row);
  workspace.allocate(args.x);
  const Sparse24FloatJob job = job_of(args, workspace.at<float>(prepared), y);
  kernels.prepare(job, workspace.at<float>(scratch));
  for_columns(job.n, job.m * k, [&](int64_t begin, int64_t end) { kernels.gemm(job, begin, end); });
}

// Blocks of rows of x, whose sums and a block of whose columns stay in L2, times chunks of columns,
// spread over the threads. Smaller blocks where there would be few: each decodes the weight anew.
void panels(const Sparse24LinearArgs& args, Tensor& y) {
  constexpr int64_t kRowBlock = 256, kLeastBlock = 32;
  const Sparse24FloatPanelKernels& kernels = sparse24_float_panel_kernels();
  const Sparse24PanelShape shape = kernels.shape(args.dtype);
  const int64_t k = args.weight.k, tiles = ceil_div(args.m, shape.tile_rows);
  Workspace workspace;
  const size_t prepared = workspace.reserve<char>(args.m * k * shape.element);
  workspace.allocate(args.x);
  const Sparse24FloatJob job = job_of(args, workspace.at<char>(prepared), y);
  for_rows(tiles, shape.tile_rows * k,
           [&](int64_t begin, int64_t end) { kernels.prepare(job, begin, end); });
  const int64_t columns = ceil_div(job.n, shape.columns);
  const int64_t tasks = 4 * int64_t{torch::stable::get_num_threads()};
  const int64_t block = std::clamp(tiles * columns / tasks, kLeastBlock / shape.tile_rows,
                                   kRowBlock / shape.tile_rows);
  const int64_t rows = std::min(tiles, block) * shape.tile_rows;
  const int64_t grain = ceil_div(64 * kGrain, rows * shape.columns * k);
  parallel_for(0, ceil_div(tiles, block) * columns, grain, [&](int64_t begin, int64_t end) {
    Workspace memory;
    const size_t scratch = memory.reserve<char>(kernels.scratch_bytes(args.dtype, rows));
    memory.allocate(args.x);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = i / columns * block, n = i % columns * shape.columns;
      kernels.gemm(job, memory.at<char>(scratch), tile, std::min(tile + block, tiles), n,
                   std::min(n + shape.columns, job.n));
    }
  });
}

Tensor sparse24_linear(Tensor x, Tensor values, Tensor meta, std::optional<Tensor> bias) {
  const Sparse24LinearArgs args = check_sparse24_linear(x, values, meta, bias);
  Tensor y = new_empty(x, shape_with_last(x, args.weight.n));
  if (args.m == 0) return y;
  if (args.m <= sparse24_float_panel_kernels().few_rows(args.dtype)) {
    few_rows(args, y);
  } else if (sparse24_float_panel_kernels().exist) {
    panels(args, y);
  } else {
    multiply_decompressed(args, bias, y);
  }
  return y;
}

Sparse24Int8Job job_of(const Sparse24Int8LinearArgs& args, Tensor& y) {
  return {args.q.const_data_ptr<int8_t>(),
          args.scale.const_data_ptr<float>(),
          args.per_tensor ? 0 : 1,
          static_cast<const int8_t*>(args.weight.values),
          args.weight.meta,
          args.weight_scale.const_data_ptr<float>(),
          args.weight_scale.numel() == 1 ? 0 : 1,
          args.bias,
          y.mutable_data_ptr(),
          to_dtype(y.scalar_type()),
          args.m,
          args.weight.n,
          args.weight.k,
          nullptr};
}

void few_rows(const Sparse24Int8LinearArgs& args, Tensor& y) {
  const Sparse24Int8Kernels& kernels = sparse24_int8_kernels();
  Sparse24Int8Job job = job_of(args, y);
  const int64_t row = kernels.prepared_row(job.k);
  Workspace workspace;
  const size_t prepared = workspace.reserve<uint8_t>(job.m * row);
  const size_t scratch = workspace.reserve<uint8_t>(row);
  workspace.allocate(args.q);
  job.prepared = workspace.at<uint8_t>(prepared);
  kernels.prepare(job, workspace.at<uint8_t>(scratch));
  for_columns(job.n, job.m * job.k,
              [&](int64_t begin, int64_t end) { kernels.gemm(job, begin, end); });
}

void panels(const Sparse24Int8LinearArgs& args, Tensor& y) {
  const Sparse24Int8PanelKernels& kernels = sparse24_int8_panel_kernels();
  Sparse24Int8Job job = job_of(args, y);
  Workspace workspace;
  const size_t prepared = workspace.reserve<uint8_t>(job.m * kernels.prepared_row(job.k));
  workspace.allocate(args.q);
  job.prepared = workspace.at<uint8_t>(prepared);
  for_rows(job.m, job.k, [&](int64_t begin, int64_t end) { kernels.prepare(job, begin, end); });

  const int64_t rows = ceil_div(job.m, ceil_div(job.m, kernels.rows)), columns = kernels.columns;
  const int64_t across = ceil_div(job.n, columns);
  const int64_t grain = ceil_div(64 * kGrain, rows * columns * job.k);
  parallel_for(0, ceil_div(job.m, rows) * across, grain, [&](int64_t begin, int64_t end) {
    Workspace memory;
    const size_t scratch = memory.reserve<char>(kernels.scratch());
    memory.allocate(args.q);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t m = i / across * rows, n = i % across * columns;
      kernels.gemm(job, memory.at<char>(scratch), m, std::min(m + rows, job.m), n,
                   std::min(n + columns, job.n));
    }
  });
}

Tensor sparse24_int8_linear(Tensor q, Tensor scale, Tensor values, Tensor meta, Tensor weight_scale,
                            std::optional<Tensor> bias, ScalarType out_dtype) {
  const Sparse24Int8LinearArgs args =
      check_sparse24_int8_linear(q, scale, values, meta, weight_scale, bias, out_dtype);
  Tensor y = new_empty(q, shape_with_last(q, args.weight.n), out_dtype);
  if (args.m == 0) return y;
  if (args.m <= sparse24_int8_kernels().few_rows) {
    few_rows(args, y);
  } else if (sparse24_int8_panel_kernels().exist) {
    panels(args, y);
  } else {
    multiply_decompressed(args, y);
  }
  return y;
}

// Blocks of rows whose digits stay in L2 times panels of columns, spread over the threads.
void panels(const Sparse24Int4LinearArgs& args, Tensor& y) {
  constexpr int64_t kColumns = 16;
  constexpr int64_t kRowBlockBytes = 512 * 1024;
  const Sparse24Int4Kernels& kernels = sparse24_int4_kernels();
  Sparse24Int4Job job{};
  job.x = args.x.const_data_ptr();
  job.dtype = args.dtype;
  job.kept = args.kept;
  job.meta = args.meta;
  job.bias = args.bias;
  job.y = y.mutable_data_ptr();
  job.m = args.m;
  job.k = args.k;
  job.planes = planes_of(args.dtype, false);
  Workspace workspace;
  const size_t digits = workspace.reserve<uint8_t>(job.m * job.digits_row());
  const size_t scales = workspace.reserve<float>(job.m * job.blocks());
  workspace.allocate(args.x);
  job.digits = workspace.at<uint8_t>(digits);
  job.scales = workspace.at<float>(scales);
  constexpr int64_t kRows = kSparseTileMultiple;
  for_rows(ceil_div(job.m, kRows), kRows * job.k, [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(job.blocks() * kActivationBlock));
    kernels.prepare(job, row.data(), begin * kRows, std::min(end * kRows, job.m));
  });

  const int64_t fitting = kRowBlockBytes / job.digits_row() / kRows * kRows;
  const int64_t row_block = std::min(job.m, std::clamp(fitting, kRows, kMaxDigitRows));
  const int64_t columns = ceil_div(job.kept.n, kColumns);
  const int64_t grain = ceil_div(64 * kGrain, row_block * kColumns * job.k);
  parallel_for(0, ceil_div(job.m, row_block) * columns, grain, [&](int64_t begin, int64_t end) {
    Workspace memory;
    const size_t scratch = memory.reserve<float>(kernels.scratch(job));
    memory.allocate(args.x);
    for (int64_t i = begin, last; i < end; i = last) {  // panels of one block of rows at a time
      last = std::min(end, (i / columns + 1) * columns);
      const int64_t m = i / columns * row_block, n = i % columns * kColumns;
      kernels.gemm(job, memory.at<float>(scratch), m, std::min(m + row_block, job.m), n,
                   std::min(n + (last - i) * kColumns, job.kept.n));
    }
  });
}

Tensor sparse24_int4_linear(Tensor x, Tensor qvalues, Tensor meta, Tensor scales,
                            std::optional<Tensor> zeros, std::optional<Tensor> bias,
                            int64_t group_size, int64_t bits) {
  const Sparse24Int4LinearArgs args =
      check_sparse24_int4_linear(x, qvalues, meta, scales, zeros, bias, group_size, bits);
  check_zeros("pumice::sparse24_int4_linear", args.kept);
  Tensor y = new_empty(x, shape_with_last(x, args.kept.n));
  if (args.m == 0) return y;
  if (bits == 4 && sparse24_int4_kernels().exist) {
    panels(args, y);
  } else {
    multiply_dequantized(args, bias, y);
  }
  return y;
}

}  // namespace

PUMICE_CPU_IMPL(m) {
  m.impl("sparse24_compress", TORCH_BOX(&sparse24_compress));
  m.impl("sparse24_gather", TORCH_BOX(&sparse24_gather));
  m.impl("sparse24_decompress", TORCH_BOX(&sparse24_decompress));
  m.impl("sparse24_linear", TORCH_BOX(&sparse24_linear));
  m.impl("sparse24_int8_linear", TORCH_BOX(&sparse24_int8_linear));
  m.impl("sparse24_int4_linear", TORCH_BOX(&sparse24_int4_linear));
}

}  // namespace pumice::cpu
