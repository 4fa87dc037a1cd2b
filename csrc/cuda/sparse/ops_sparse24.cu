// The 2:4 operators on CUDA: arguments, workspace and which kernels; the arithmetic is in the
// kernels.
//
// Nothing waits for the device, so that every operator can be captured in a CUDA graph. So nobody
// looks at the weights either: of a group with more than two nonzeros sparse24_compress keeps the
// first two, where the CPU refuses it; and of metadata that no matrix has the products are
// undefined (but read nothing foreign). pumice.ops.sparse24_compress looks first.
#include <algorithm>
#include <cstdlib>

#include "common/sparse24_args.h"
#include "cuda/gemm/aten_product.h"
#include "cuda/gemm/int4_dequantized.h"
#include "cuda/gemm/int4_tiles.h"
#include "cuda/quantize/int4_weight.h"
#include "cuda/sparse/sparse24_dense.h"
#include "cuda/sparse/sparse24_gemm.h"
#include "cuda/sparse/sparse24_weight.h"
#include "cuda/tensor_access.h"
#include "cuda/workspace.h"

namespace pumice::cuda {
namespace {

using torch::stable::new_empty;

int bytes_of(ScalarType dtype) { return static_cast<int>(element_bytes(dtype)); }

uint32_t magnitude_bits(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Char:
      return 0xffu;
    case ScalarType::Float:
      return 0x7fffffffu;
    default:
      return 0x7fffu;
  }
}

std::tuple<Tensor, Tensor> sparse24_compress(Tensor w) {
  const Sparse24DenseArgs args = check_sparse24_dense("pumice::sparse24_compress", w);
  const DeviceGuard guard(w);
  Tensor values = new_empty(w, {args.n, args.k / 2});
  Tensor meta = new_empty(w, {args.n, sparse24_meta_bytes(args.k)}, ScalarType::Byte);
  sparse24_compress_matrix(read_pointer<void>(args.dense), args.n, args.k,
                           {bytes_of(w.scalar_type()), magnitude_bits(w.scalar_type())},
                           write_pointer<void>(values), write_pointer<uint8_t>(meta),
                           current_stream(w));
  return {values, meta};
}

Tensor sparse24_gather(Tensor w, Tensor meta) {
  const char* op = "pumice::sparse24_gather";
  const Sparse24DenseArgs args = check_sparse24_dense(op, w);
  check_sparse24_meta(op, meta, args.n, args.k, w);
  const DeviceGuard guard(w);
  Tensor values = new_empty(w, {args.n, args.k / 2});
  sparse24_gather_matrix(read_pointer<void>(args.dense), read_pointer<uint8_t>(meta), args.n,
                         args.k, bytes_of(w.scalar_type()), write_pointer<void>(values),
                         current_stream(w));
  return values;
}

Tensor sparse24_decompress(Tensor values, Tensor meta) {
  const Sparse24Weight weight = check_sparse24_weight("pumice::sparse24_decompress", values, meta);
  const DeviceGuard guard(values);
  Tensor w = new_empty(values, {weight.n, weight.k});
  sparse24_decompress_matrix(read_pointer<void>(values), read_pointer<uint8_t>(meta), weight.n,
                             weight.k, bytes_of(values.scalar_type()), write_pointer<void>(w),
                             current_stream(values));
  return w;
}

void check_size(const char* op, int64_t m, int64_t n, int64_t k) {
  constexpr int64_t kMaxSize = 1 << 29;  // so that a row's bytes and what follows them are an int
  PUMICE_CHECK(m <= kMaxSize && n <= kMaxSize && k <= kMaxSize, op,
               "M, N and K must be at most 2^29, not ", m, ", ", n, ", ", k);
}

// The same elements where kernels read `bytes` at once: views may begin anywhere.
Tensor on_boundary(const Tensor& tensor, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0) return tensor;
  Tensor moved = new_empty(tensor, tensor.sizes());
  torch::stable::copy_(moved, tensor);
  return moved;
}

// A product and the tensors that it points to.
struct Product {
  Tensor x, meta, y;  // x [..., K] contiguous, y [..., N]
  Sparse24Product fields{};
};

// With all that does not depend on the type of the values.
Product new_product(const char* op, const Tensor& x, const Tensor& meta,
                    const std::optional<Tensor>& bias, ScalarType y_dtype, int64_t n, int64_t k) {
  const int64_t m = x.numel() / k;
  check_size(op, m, n, k);
  Product product{x, on_boundary(meta, 4), new_empty(x, shape_with_last(x, n), y_dtype)};
  Sparse24Product& fields = product.fields;
  fields.meta = read_pointer<uint8_t>(product.meta);
  fields.x = read_pointer<void>(product.x);
  fields.bias = read_view(bias);
  fields.y = write_pointer<void>(product.y);
  fields.y_dtype = to_dtype(y_dtype);
  fields.m = m;
  fields.n = n;
  fields.k = k;
  fields.y_stride = n;
  return product;
}

using Launcher = void (*)(const Sparse24Product&, const Sparse24Plan&, bool, cudaStream_t);

// Plans the product, gives it a workspace and launches it.
template <Sparse24Kind kKind>
void multiply(Sparse24Product product, const Tensor& like, Launcher launcher) {
  const cudaStream_t stream = current_stream(like);
  const DeviceProperties& device = device_properties(like);
  const bool aligned = sparse24_is_aligned<kKind>(product);
  const int64_t m = product.m, n = product.n;
  const Sparse24Plan plan =
      plan_sparse24<kKind>(m, n, product.k, aligned, device.sm_count, device.shared_memory_limit);
  const int64_t tickets = ticket_count(plan, m, n);
  Workspace workspace;
  const size_t partial_sums = workspace.reserve(partial_sum_bytes(plan, m, n));
  const size_t ticket_words = workspace.reserve(tickets * 4);
  workspace.allocate(like);
  if (tickets) {
    product.partial_sums = workspace.at<void>(partial_sums);
    product.tickets = workspace.at<uint32_t>(ticket_words);
    fill_zero(product.tickets, static_cast<size_t>(tickets) * 4, stream);
  }
  launcher(product, plan, aligned, stream);
}

// From how many tokens on the weight is written out dense; to be set for measurements.
int64_t dense_from(DType dtype, const Tensor& x) {
  const char* forced = std::getenv("PUMICE_SPARSE24_DENSE_FROM");
  if (forced == nullptr) return sparse24_dense_from(dtype, device_properties(x).compute_capability);
  char* end = nullptr;
  const int64_t tokens = std::strtoll(forced, &end, 10);
  STD_TORCH_CHECK(end != forced && *end == 0 && tokens >= 0,
                  "pumice: PUMICE_SPARSE24_DENSE_FROM must be a number of tokens, not ", forced);
  return tokens;
}

// Of values of the dtype of x, for columns n0 .. of y.
void multiply_floating(const Product& product, const Sparse24Product& part, int64_t n0) {
  const Tensor& x = product.x;
  const DType dtype = part.y_dtype;
  if (part.m >= dense_from(dtype, x)) {
    const Tensor y = torch::stable::view(product.y, {part.m, part.y_stride});
    return sparse24_linear_dense(part, torch::stable::view(x, {part.m, part.k}),
                                 slice(y, 1, n0, part.n));
  }
  if (dtype == DType::kFloat32) {
    return sparse24_gemm_fp32(part, device_properties(x).sm_count, current_stream(x));
  }
  multiply<Sparse24Kind::k16Bit>(
      part, x, dtype == DType::kFloat16 ? sparse24_gemm_fp16 : sparse24_gemm_bf16);
}

// fp32 is read in pieces of 16 bytes of x and 8 of values.
Tensor in_pieces(const Tensor& tensor, DType dtype, uintptr_t bytes) {
  return dtype == DType::kFloat32 ? on_boundary(tensor, bytes) : tensor;
}

Tensor sparse24_linear(Tensor x, Tensor values, Tensor meta, std::optional<Tensor> bias) {
  const Sparse24LinearArgs args = check_sparse24_linear(x, values, meta, bias);
  const DeviceGuard guard(x);
  const Tensor aligned_values = in_pieces(values, args.dtype, 8);
  Product product = new_product("pumice::sparse24_linear", in_pieces(args.x, args.dtype, 16), meta,
                                bias, x.scalar_type(), args.weight.n, args.weight.k);
  if (args.m == 0) return product.y;
  product.fields.values = read_pointer<void>(aligned_values);
  multiply_floating(product, product.fields, 0);
  return product.y;
}

Tensor sparse24_int8_linear(Tensor q, Tensor scale, Tensor values, Tensor meta, Tensor weight_scale,
                            std::optional<Tensor> bias, ScalarType out_dtype) {
  const Sparse24Int8LinearArgs args =
      check_sparse24_int8_linear(q, scale, values, meta, weight_scale, bias, out_dtype);
  const DeviceGuard guard(q);
  Product product = new_product("pumice::sparse24_int8_linear", args.q, meta, bias, out_dtype,
                                args.weight.n, args.weight.k);
  if (args.m == 0) return product.y;
  Sparse24Product& fields = product.fields;
  fields.values = read_pointer<void>(values);
  fields.token_scale = read_pointer<float>(args.scale);
  fields.token_scale_stride = args.per_tensor ? 0 : 1;
  fields.weight_scale = read_pointer<float>(weight_scale);
  fields.weight_scale_stride = weight_scale.numel() == 1 ? 0 : 1;
  multiply<Sparse24Kind::kInt8>(fields, q, sparse24_gemm_int8);
  return product.y;
}

// Rows n0 .. n0 + count - 1 of a packed weight.
IntnWeight rows_of(const IntnWeight& weight, int64_t n0, int64_t count) {
  const auto skip = [](const void* matrix, int64_t bytes) {
    return matrix ? static_cast<const uint8_t*>(matrix) + bytes : nullptr;
  };
  const int64_t terms = n0 * weight.groups;
  const int64_t zero_bytes =
      weight.zero_kind == ZeroKind::kInteger ? 1 : size_of(weight.scale_dtype);
  IntnWeight rows = weight;
  rows.n = count;
  rows.qweight += n0 * intn_words(weight.k, weight.bits);
  rows.scales = skip(weight.scales, terms * size_of(weight.scale_dtype));
  rows.zeros = skip(weight.zeros, terms * zero_bytes);
  return rows;
}

// The product with the kept values written out in the dtype of x: in parts of bounded size, one
// after the other in the same memory.
void multiply_written_out(const Product& product) {
  const Sparse24Product& whole = product.fields;
  const DType dtype = whole.y_dtype;
  const int64_t n = whole.n, kept = whole.k / 2, bytes = size_of(dtype);
  const int64_t rows_at_once =
      int4_rows_at_once(n, kept * bytes / 2, device_properties(product.x).workspace_limit);
  const Tensor values = new_empty(product.x, {rows_at_once, kept});
  void* written = write_pointer<void>(values);
  for (int64_t n0 = 0; n0 < n; n0 += rows_at_once) {
    Sparse24Product part = whole;
    part.n = std::min(rows_at_once, n - n0);
    dequantize_weight(rows_of(whole.kept, n0, part.n), written, kept, dtype,
                      current_stream(product.x));
    part.values = written;
    part.meta += n0 * sparse24_meta_bytes(whole.k);
    if (part.bias.data) {
      part.bias.data = static_cast<const uint8_t*>(part.bias.data) + n0 * size_of(part.bias.dtype);
    }
    part.y = static_cast<uint8_t*>(whole.y) + n0 * bytes;
    multiply_floating(product, part, n0);
  }
}

Tensor sparse24_int4_linear(Tensor x, Tensor qvalues, Tensor meta, Tensor scales,
                            std::optional<Tensor> zeros, std::optional<Tensor> bias,
                            int64_t group_size, int64_t bits) {
  const char* op = "pumice::sparse24_int4_linear";
  const Sparse24Int4LinearArgs args =
      check_sparse24_int4_linear(x, qvalues, meta, scales, zeros, bias, group_size, bits);
  const DeviceGuard guard(x);
  Product product = new_product(op, in_pieces(args.x, args.dtype, 16), meta, bias, x.scalar_type(),
                                args.kept.n, args.k);
  if (args.m == 0) return product.y;
  Sparse24Product& fields = product.fields;
  fields.kept = device_weight(args.kept, qvalues, scales, zeros, std::nullopt);
  if (!sparse24_sums_integers(args.kept) || args.dtype == DType::kFloat32 ||
      args.m >= kSparse24DequantizeFrom) {
    multiply_written_out(product);
    return product.y;
  }
  fields.values = fields.kept.qweight;
  multiply<Sparse24Kind::kInt4>(
      fields, x, args.dtype == DType::kFloat16 ? sparse24_gemm_int4_fp16 : sparse24_gemm_int4_bf16);
  return product.y;
}

}  // namespace

PUMICE_CUDA_IMPL(m) {
  m.impl("sparse24_compress", TORCH_BOX(&sparse24_compress));
  m.impl("sparse24_gather", TORCH_BOX(&sparse24_gather));
  m.impl("sparse24_decompress", TORCH_BOX(&sparse24_decompress));
  m.impl("sparse24_linear", TORCH_BOX(&sparse24_linear));
  m.impl("sparse24_int8_linear", TORCH_BOX(&sparse24_int8_linear));
  m.impl("sparse24_int4_linear", TORCH_BOX(&sparse24_int4_linear));
}

}  // namespace pumice::cuda
