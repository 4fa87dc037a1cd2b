#include <algorithm>
#include <array>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/int4_operator.h"
#include "cpu/sparse24_dense.h"
#include "cpu/workspace.h"

namespace pumice::cpu {
namespace {

using torch::stable::new_empty;

// Elements of a chunk of the weight: of 4 MB in fp32, 2 MB in 16 bit.
constexpr int64_t kChunkElements = int64_t{1} << 20;

Tensor part(Tensor tensor, int64_t dim, int64_t start, int64_t length) {
  return torch::stable::narrow(tensor, dim, start, length);
}

// out = x · wᵀ + bias. aten::linear.out, which autocast leaves alone and which writes a part of the
// columns of y in place.
void linear_out(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias,
                const Tensor& out) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(x), torch::stable::detail::from(w),
                                    torch::stable::detail::from(bias),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // what is left on the stack has an owner
}

// out = the rows of x [M, K] in fp32
Tensor in_fp32(const Tensor& x, DType dtype, int64_t m, int64_t k) {
  Tensor out = new_empty(x, {m, k}, ScalarType::Float);
  const Int4Activations rows{x.const_data_ptr(), dtype, m, k, nullptr, nullptr};
  for_rows(m, k, [&](int64_t begin, int64_t end) {
    int4_gemm_kernels().gather_rows(rows, out.mutable_data_ptr<float>(), begin, end);
  });
  return out;
}

// y = x · Wᵀ + bias in the dtype of x [M, K]; write(n, chunk) makes the rows of W from n on.
template <typename Write>
void multiply_chunks(const Tensor& x, int64_t n, const std::optional<Tensor>& bias, Tensor& y,
                     const Write& write) {
  const int64_t m = x.size(0), k = x.size(1);
  const int64_t rows = std::min(n, std::max<int64_t>(64, kChunkElements / k));
  Tensor chunk = new_empty(x, {rows, k});
  const Tensor flat = torch::stable::view(y, {m, n});
  const bool in_place = y.scalar_type() == x.scalar_type();
  std::optional<Tensor> product;
  if (!in_place) product = new_empty(x, {m, rows});
  std::optional<Tensor> addend;
  if (bias) addend = torch::stable::to(*bias, x.scalar_type());
  for (int64_t begin = 0; begin < n; begin += rows) {
    const int64_t count = std::min(rows, n - begin);
    const Tensor w = part(chunk, 0, 0, count);
    write(begin, w);
    Tensor target = part(flat, 1, begin, count);
    const Tensor out = in_place ? target : part(*product, 1, 0, count);
    linear_out(x, w, addend ? std::optional(part(*addend, 0, begin, count)) : std::nullopt, out);
    if (!in_place) torch::stable::copy_(target, out);
  }
}

}  // namespace

void decompress_rows(const Sparse24Weight& weight, int64_t element, void* w, int64_t begin,
                     int64_t end) {
  for_rows(end - begin, weight.k, [&](int64_t first, int64_t last) {
    sparse24_weight_kernels().decompress_rows(weight.values, weight.meta, element, weight.k,
                                              static_cast<char*>(w) + first * weight.k * element,
                                              begin + first, begin + last);
  });
}

void multiply_decompressed(const Sparse24LinearArgs& args, const std::optional<Tensor>& bias,
                           Tensor& y) {
  const Sparse24Weight& weight = args.weight;
  const int64_t k = weight.k;
  if (args.dtype != DType::kFloat16) {
    const Tensor x = torch::stable::view(args.x, {args.m, k});
    multiply_chunks(x, weight.n, bias, y, [&](int64_t begin, const Tensor& w) {
      decompress_rows(weight, size_of(args.dtype), w.mutable_data_ptr(), begin, begin + w.size(0));
    });
    return;
  }
  const Tensor x = in_fp32(args.x, args.dtype, args.m, k);
  multiply_chunks(x, weight.n, bias, y, [&](int64_t begin, const Tensor& w) {
    float* out = w.mutable_data_ptr<float>();
    for_rows(w.size(0), k, [&](int64_t first, int64_t last) {
      std::vector<uint16_t> row(static_cast<size_t>(k));
      const Int4Activations of_row{row.data(), DType::kFloat16, 1, k, nullptr, nullptr};
      for (int64_t n = first; n < last; ++n) {
        sparse24_weight_kernels().decompress_rows(weight.values, weight.meta, sizeof(uint16_t), k,
                                                  row.data(), begin + n, begin + n + 1);
        int4_gemm_kernels().gather_rows(of_row, out + n * k, 0, 1);
      }
    });
  });
}

void multiply_dequantized(const Sparse24Int4LinearArgs& args, const std::optional<Tensor>& bias,
                          Tensor& y) {
  const int64_t k = args.k, meta_bytes = sparse24_meta_bytes(k);
  const Tensor x = in_fp32(args.x, args.dtype, args.m, k);
  multiply_chunks(x, args.kept.n, bias, y, [&](int64_t begin, const Tensor& w) {
    float* out = w.mutable_data_ptr<float>();
    for_rows(w.size(0), k, [&](int64_t first, int64_t last) {
      std::vector<float> memory(static_cast<size_t>(k));
      float* values = memory.data();
      float* row = values + k / 2;
      for (int64_t n = first; n < last; ++n) {
        const IntnWeight of_row = rows_from(args.kept, begin + n, 1);
        int4_weight_kernels().dequantize_rows(of_row, values, DType::kFloat32, row, 0, 1);
        sparse24_weight_kernels().decompress_rows(values, args.meta + (begin + n) * meta_bytes,
                                                  sizeof(float), k, out + n * k, 0, 1);
      }
    });
  });
}

}  // namespace pumice::cpu
