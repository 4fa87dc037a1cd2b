// The 2:4 operators on CUDA: arguments, workspace and which kernels; the arithmetic is in the
// kernels.
//
// Nothing waits for the device, so that every operator can be captured in a CUDA graph. So nobody
// looks at the weights either: of a group with more than two nonzeros sparse24_compress keeps the
// first two, where the CPU refuses it; and of metadata that no matrix has the products are
// undefined (but read nothing foreign). pumice.ops.sparse24_compress looks first.
#include <algorithm>

#include "common/sparse24_args.h"
#include "cuda/gemm/int4_tiles.h"
#include "cuda/quantize/int4_weight.h"
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

// Metadata is read word by word; a tensor of bytes may begin anywhere.
Tensor with_aligned_words(const Tensor& meta) {
  if (reinterpret_cast<uintptr_t>(meta.const_data_ptr()) % 4 == 0) return meta;
  Tensor aligned = new_empty(meta, meta.sizes());
  torch::stable::copy_(aligned, meta);
  return aligned;
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
  const int64_t tickets = sparse24_ticket_count(plan, m, n);
  Workspace workspace;
  const size_t partial_sums = workspace.reserve(sparse24_partial_bytes(plan, m, n));
  const size_t ticket_words = workspace.reserve(tickets * 4);
  workspace.allocate(like);
  if (tickets) {
    product.partial_sums = workspace.at<void>(partial_sums);
    product.tickets = workspace.at<uint32_t>(ticket_words);
    fill_zero(product.tickets, static_cast<size_t>(tickets) * 4, stream);
  }
  launcher(product, plan, aligned, stream);
}

void check_16bit(const char* op, DType dtype) {
  PUMICE_CHECK(dtype != DType::kFloat32, op,
               "float32 has kernels on the CPU only; on CUDA x must be float16 or bfloat16");
}

Tensor sparse24_linear(Tensor x, Tensor values, Tensor meta, std::optional<Tensor> bias) {
  const char* op = "pumice::sparse24_linear";
  const Sparse24LinearArgs args = check_sparse24_linear(x, values, meta, bias);
  check_16bit(op, args.dtype);
  const int64_t n = args.weight.n, k = args.weight.k;
  check_size(op, args.m, n, k);
  const DeviceGuard guard(x);
  Tensor y = new_empty(x, shape_with_last(x, n));
  if (args.m == 0) return y;
  const Tensor words = with_aligned_words(meta);
  Sparse24Product product{};
  product.values = read_pointer<void>(values);
  product.meta = read_pointer<uint8_t>(words);
  product.x = read_pointer<void>(args.x);
  product.bias = read_view(bias);
  product.y = write_pointer<void>(y);
  product.y_dtype = args.dtype;
  product.m = args.m;
  product.n = n;
  product.k = k;
  product.y_stride = n;
  multiply<Sparse24Kind::k16Bit>(
      product, x, args.dtype == DType::kFloat16 ? sparse24_gemm_fp16 : sparse24_gemm_bf16);
  return y;
}

Tensor sparse24_int8_linear(Tensor q, Tensor scale, Tensor values, Tensor meta, Tensor weight_scale,
                            std::optional<Tensor> bias, ScalarType out_dtype) {
  const Sparse24Int8LinearArgs args =
      check_sparse24_int8_linear(q, scale, values, meta, weight_scale, bias, out_dtype);
  const int64_t n = args.weight.n, k = args.weight.k;
  check_size("pumice::sparse24_int8_linear", args.m, n, k);
  const DeviceGuard guard(q);
  Tensor y = new_empty(q, shape_with_last(q, n), out_dtype);
  if (args.m == 0) return y;
  const Tensor words = with_aligned_words(meta);
  Sparse24Product product{};
  product.values = read_pointer<void>(values);
  product.meta = read_pointer<uint8_t>(words);
  product.x = read_pointer<void>(args.q);
  product.bias = read_view(bias);
  product.y = write_pointer<void>(y);
  product.y_dtype = to_dtype(out_dtype);
  product.m = args.m;
  product.n = n;
  product.k = k;
  product.y_stride = n;
  product.token_scale = read_pointer<float>(args.scale);
  product.token_scale_stride = args.per_tensor ? 0 : 1;
  product.weight_scale = read_pointer<float>(weight_scale);
  product.weight_scale_stride = weight_scale.numel() == 1 ? 0 : 1;
  multiply<Sparse24Kind::kInt8>(product, q, sparse24_gemm_int8);
  return y;
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
void multiply_written_out(const Sparse24Product& product, const Sparse24Int4LinearArgs& args,
                          const Tensor& x) {
  const int64_t n = product.n, kept = product.k / 2;
  const int64_t rows_at_once = int4_rows_at_once(n, kept, device_properties(x).workspace_limit);
  const Tensor values = new_empty(x, {rows_at_once, kept});
  void* written = write_pointer<void>(values);
  for (int64_t n0 = 0; n0 < n; n0 += rows_at_once) {
    Sparse24Product part = product;
    part.n = std::min(rows_at_once, n - n0);
    dequantize_weight(rows_of(product.kept, n0, part.n), written, kept, args.dtype,
                      current_stream(x));
    part.values = written;
    part.meta += n0 * sparse24_meta_bytes(product.k);
    if (part.bias.data) {
      part.bias.data = static_cast<const uint8_t*>(part.bias.data) + n0 * size_of(part.bias.dtype);
    }
    part.y = static_cast<uint8_t*>(product.y) + n0 * size_of(args.dtype);
    multiply<Sparse24Kind::k16Bit>(
        part, x, args.dtype == DType::kFloat16 ? sparse24_gemm_fp16 : sparse24_gemm_bf16);
  }
}

Tensor sparse24_int4_linear(Tensor x, Tensor qvalues, Tensor meta, Tensor scales,
                            std::optional<Tensor> zeros, std::optional<Tensor> bias,
                            int64_t group_size, int64_t bits) {
  const char* op = "pumice::sparse24_int4_linear";
  const Sparse24Int4LinearArgs args =
      check_sparse24_int4_linear(x, qvalues, meta, scales, zeros, bias, group_size, bits);
  check_16bit(op, args.dtype);
  const int64_t n = args.kept.n, k = args.k;
  check_size(op, args.m, n, k);
  const DeviceGuard guard(x);
  Tensor y = new_empty(x, shape_with_last(x, n));
  if (args.m == 0) return y;
  const Tensor words = with_aligned_words(meta);
  Sparse24Product product{};
  product.meta = read_pointer<uint8_t>(words);
  product.x = read_pointer<void>(args.x);
  product.bias = read_view(bias);
  product.y = write_pointer<void>(y);
  product.y_dtype = args.dtype;
  product.m = args.m;
  product.n = n;
  product.k = k;
  product.y_stride = n;
  product.kept = args.kept;
  product.kept.qweight = read_pointer<uint32_t>(qvalues);
  product.kept.scales = read_pointer<void>(scales);
  product.kept.zeros = zeros ? read_pointer<void>(*zeros) : nullptr;
  const bool is_fp16 = args.dtype == DType::kFloat16;
  if (args.m < kSparse24DequantizeFrom && sparse24_sums_integers(args.kept)) {
    product.values = product.kept.qweight;
    multiply<Sparse24Kind::kInt4>(product, x,
                                  is_fp16 ? sparse24_gemm_int4_fp16 : sparse24_gemm_int4_bf16);
    return y;
  }
  multiply_written_out(product, args, x);
  return y;
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
