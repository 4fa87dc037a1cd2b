// int4_linear for many tokens. All its terms are one product of longer rows, so that their sum is
// kept in fp32 and rounded once, y = X · Vᵀ with
//
//   X = [ x[:, perm] | x[:, outlier_idx] | x·lora_aᵀ | 1    | 0 ]
//   V = [ W          | outlier_weight    | lora_b    | bias | 0 ]
//
// all in the dtype of x, W and x·lora_aᵀ included; the zeros fill rows up to 16 bytes. Where there
// is but x and W, x is taken as it lies. The product is torch's (aten_product.h).
//
// All is ordered by the stream, nothing waits for the device. Weights are written out in parts of
// bounded size, one after the other in the same memory.
#include "cuda/gemm/int4_dequantized.h"

#include <algorithm>

#include "cuda/gemm/aten_product.h"
#include "cuda/gemm/int4_gemm.h"
#include "cuda/quantize/int4_weight.h"

namespace pumice::cuda {
namespace {

using torch::stable::new_empty;

// Places in the longer rows.
struct Columns {
  int64_t outliers, low_rank, bias, end, padded;

  explicit Columns(const Int4LinearArgs& args)
      : outliers(args.weight.k),
        low_rank(outliers + args.outlier_weight.columns),
        bias(low_rank + args.lora_a.rows),
        end(bias + (args.bias.data != nullptr)),
        padded((end + 7) / 8 * 8) {}
};

Tensor longer_tokens(const Int4LinearArgs& args, const Int4Tensors& tensors,
                     const Columns& columns) {
  const Tensor x = torch::stable::view(args.x, {args.m, args.weight.k});
  Tensor tokens = new_empty(x, {args.m, columns.padded});
  Int4Preparation preparation{};
  preparation.x = read_pointer<void>(x);
  preparation.dtype = args.dtype;
  preparation.m = args.m;
  preparation.k = args.weight.k;
  preparation.perm = tensors.perm ? read_pointer<int32_t>(*tensors.perm) : nullptr;
  preparation.appended_idx =
      tensors.outlier_idx ? read_pointer<int32_t>(*tensors.outlier_idx) : nullptr;
  preparation.appended = args.outlier_weight.columns;
  preparation.high = write_pointer<void>(tokens);
  preparation.stride = columns.padded;
  int4_prepare(preparation, device_properties(x).sm_count, current_stream(x));
  if (args.lora_a.rows) {
    const Tensor lora_a = torch::stable::to(*tensors.lora_a, x.scalar_type());
    multiply_transposed(x, lora_a, slice(tokens, 1, columns.low_rank, args.lora_a.rows));
  }
  if (tensors.bias) torch::stable::fill_(slice(tokens, 1, columns.bias, 1), 1.0);
  return tokens;
}

// Rows n0 .. n0 + part.size(0) - 1 of the longer weight; its zeros are there already.
void write_weight(const Int4LinearArgs& args, const Int4Tensors& tensors, const Columns& columns,
                  int64_t n0, Tensor& part) {
  const int64_t count = part.size(0);
  const auto rows_of = [&](const Tensor& whole) { return slice(whole, 0, n0, count); };
  IntnWeight weight = args.weight;
  weight.n = count;
  const std::optional<Tensor> zeros =
      tensors.zeros ? std::optional(rows_of(*tensors.zeros)) : std::nullopt;
  dequantize_weight(device_weight(weight, rows_of(tensors.qweight), rows_of(tensors.scales), zeros,
                                  tensors.g_idx),
                    write_pointer<void>(part), columns.padded, args.dtype, current_stream(part));
  const auto append = [&](const Tensor& source, int64_t place) {
    Tensor target = slice(part, 1, place, source.size(1));
    if (source.size(1)) torch::stable::copy_(target, rows_of(source));
  };
  if (tensors.outlier_weight) append(*tensors.outlier_weight, columns.outliers);
  if (tensors.lora_b) append(*tensors.lora_b, columns.low_rank);
  if (tensors.bias) append(torch::stable::unsqueeze(*tensors.bias, 1), columns.bias);
}

}  // namespace

void int4_linear_dequantized(const Int4LinearArgs& args, const Int4Tensors& tensors, Tensor& y) {
  const int64_t m = args.m, n = args.weight.n, k = args.weight.k;
  const Columns columns(args);
  const bool as_it_lies = columns.padded == k && !tensors.perm &&
                          reinterpret_cast<uintptr_t>(args.x.const_data_ptr()) % 16 == 0;
  const Tensor tokens =
      as_it_lies ? torch::stable::view(args.x, {m, k}) : longer_tokens(args, tensors, columns);
  const int64_t rows_at_once =
      int4_rows_at_once(n, columns.padded, device_properties(args.x).workspace_limit);
  Tensor weight = new_empty(args.x, {rows_at_once, columns.padded});
  if (columns.padded > columns.end) {
    Tensor unused = slice(weight, 1, columns.end, columns.padded - columns.end);
    torch::stable::zero_(unused);
  }
  const Tensor flat = torch::stable::view(y, {m, n});
  for (int64_t n0 = 0; n0 < n; n0 += rows_at_once) {
    const int64_t count = std::min(rows_at_once, n - n0);
    Tensor part = slice(weight, 0, 0, count);
    write_weight(args, tensors, columns, n0, part);
    multiply_transposed(tokens, part, slice(flat, 1, n0, count));
  }
}

}  // namespace pumice::cuda
