// The int4 operators on the CPU: arguments, workspace and threads; the arithmetic is in int4_*.cpp.
#include <algorithm>
#include <atomic>
#include <vector>

#include "common/intn_args.h"
#include "cpu/dispatch.h"
#include "cpu/int4_operator.h"
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

// Blocks of rows whose digits stay in L2 times chunks of columns, spread over the threads.
void run_digits(const IntnWeight& weight, const Int4Activations& x, bool int8_activation,
                const Int4Epilogue& epilogue, const Tensor& like) {
  constexpr int64_t kColumnChunk = 64;
  constexpr int64_t kRowBlockBytes = 512 * 1024;
  const Int4DigitKernels& kernels = x.m <= kFewRows ? int4_few_kernels() : int4_panel_kernels();
  const Segments segments(weight);
  Int4DigitJob job = digit_job(segments, x, planes_of(x.dtype, int8_activation));
  job.weight = weight;
  job.epilogue = epilogue;

  Workspace workspace;
  const size_t digits = workspace.reserve<int32_t>(x.m * job.digits_per_row());
  const size_t statistics = workspace.reserve<float>(x.m * job.statistics_per_row());
  workspace.allocate(like);
  job.digits = workspace.at<int32_t>(digits);
  job.statistics = workspace.at<float>(statistics);
  for_rows(ceil_div(x.m, kTileRows), kTileRows * x.k, [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(job.blocks * kActivationBlock));
    kernels.prepare(job, row.data(), begin * kTileRows, std::min(end * kTileRows, x.m));
  });

  const int64_t fitting = kRowBlockBytes / (x.k * job.planes) / kTileRows * kTileRows;
  const int64_t row_block = std::clamp(fitting, kTileRows, kMaxDigitRows);
  const int64_t column_chunks = ceil_div(weight.n, kColumnChunk);
  const int64_t blocks = ceil_div(x.m, row_block) * column_chunks;
  const int64_t block_work = std::min(x.m, row_block) * kColumnChunk * x.k;
  parallel_for(0, blocks, ceil_div(64 * kGrain, block_work), [&](int64_t begin, int64_t end) {
    Workspace scratch;
    const size_t floats = scratch.reserve<float>(kernels.scratch(job));
    scratch.allocate(like);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t m = block / column_chunks * row_block;
      const int64_t n = block % column_chunks * kColumnChunk;
      kernels.gemm(job, scratch.at<float>(floats), m, std::min(m + row_block, x.m), n,
                   std::min(n + kColumnChunk, weight.n));
    }
  });
}

void run_general(const IntnWeight& weight, const Int4Activations& x, bool int8_activation,
                 const Int4Epilogue& epilogue, const Tensor& like) {
  const Int4GemmKernels& kernels = int4_gemm_kernels();
  Workspace workspace;
  const size_t gathered = workspace.reserve<float>(x.m * x.k);
  workspace.allocate(like);
  float* rows = workspace.at<float>(gathered);
  for_rows(x.m, x.k, [&](int64_t begin, int64_t end) {
    (int8_activation ? kernels.round_rows : kernels.gather_rows)(x, rows, begin, end);
  });
  const Int4GemmJob job{weight, rows, x.m, epilogue};
  constexpr int64_t kColumnChunk = 16;
  const int64_t grain = ceil_div(64 * kGrain, kColumnChunk * x.m * x.k);
  parallel_for(0, ceil_div(weight.n, kColumnChunk), grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(kernels.gemm_scratch(x.k, epilogue.extras())));
    kernels.gemm(job, scratch.data(), begin * kColumnChunk, std::min(end * kColumnChunk, weight.n));
  });
}

// extra[m] = (x[m, outlier_idx], x[m] · lora_a^T): what the dense terms multiply.
void fill_extra(const Int4LinearArgs& args, float* extra) {
  const Int4GemmKernels& kernels = int4_gemm_kernels();
  const int64_t k = args.weight.k, outliers = args.outlier_weight.columns;
  const int64_t extras = outliers + args.lora_a.rows;
  const Int4Activations x{args.x.const_data_ptr(), args.dtype, args.m, k, nullptr, nullptr};
  for_rows(args.m, k * (1 + args.lora_a.rows), [&](int64_t begin, int64_t end) {
    std::vector<float> memory(static_cast<size_t>((end - begin + 1) * k));
    float* row = memory.data() + (end - begin) * k;
    // Rows begin … end - 1 lie at the beginning of the memory.
    const Int4Activations part{static_cast<const char*>(x.x) + begin * k * size_of(x.dtype),
                               x.dtype,
                               end - begin,
                               k,
                               nullptr,
                               nullptr};
    kernels.gather_rows(part, memory.data(), 0, end - begin);
    for (int64_t m = begin; m < end; ++m) {
      for (int64_t j = 0; j < outliers; ++j) {
        extra[m * extras + j] = memory[(m - begin) * k + args.outlier_idx[j]];
      }
    }
    kernels.multiply_rows(memory.data(), k, args.lora_a, row, extra + begin * extras + outliers,
                          extras, 0, end - begin);
  });
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
  const IntnWeight weight = checked_weight(op, args.weight);
  const int64_t outliers = args.outlier_weight.columns;
  check_range(op, "perm", args.perm, weight.k, weight.k);
  check_range(op, "outlier_idx", args.outlier_idx, outliers, weight.k);
  Tensor y = new_empty(x, shape_with_last(x, weight.n), x.scalar_type());
  if (args.m == 0) return y;

  const int64_t extras = outliers + args.lora_a.rows;
  std::vector<float> extra(static_cast<size_t>(args.m * extras));
  if (extras) fill_extra(args, extra.data());
  // Outlier columns see x itself and weigh nothing here: their size shall not cost the others bits.
  std::vector<uint8_t> left_out(static_cast<size_t>(int8_activation && outliers ? weight.k : 0));
  if (!left_out.empty()) {
    for (int64_t j = 0; j < outliers; ++j) left_out[args.outlier_idx[j]] = 1;
  }
  const Int4Activations activations{args.x.const_data_ptr(),
                                    args.dtype,
                                    args.m,
                                    weight.k,
                                    args.perm,
                                    left_out.empty() ? nullptr : left_out.data()};
  const Int4Epilogue epilogue{extra.data(),         args.outlier_weight, args.lora_b, args.bias,
                              y.mutable_data_ptr(), args.dtype,          weight.n};
  const bool digits = int4_panel_kernels().exist && weight.bits == 4 && !weight.g_idx;
  (digits ? run_digits : run_general)(weight, activations, int8_activation, epilogue, x);
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
