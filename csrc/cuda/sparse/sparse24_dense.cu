// kernel: sparse24_bias
//
// The 2:4 product of many tokens: the weight is decompressed (sparse24_weight.cu), in parts of
// bounded size, one after the other in the same memory, and multiplied by torch's product, whose
// result the kernel here adds the bias to, in fp32: of 16-bit numbers it is rounded twice, as
// torch's product followed by an addition is.
//
// All is ordered by the stream, nothing waits for the device.
#include "cuda/sparse/sparse24_dense.h"

#include <algorithm>

#include "cuda/element.h"
#include "cuda/gemm/aten_product.h"
#include "cuda/gemm/int4_tiles.h"
#include "cuda/sparse/sparse24_weight.h"

namespace pumice::cuda {
namespace {

constexpr int kThreads = 256;

// y[m, n] += bias[n]: a column by a thread, tokens by the blocks along y.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sparse24_bias_kernel(T* y, int64_t y_stride, int64_t m, int64_t n,
                         const __grid_constant__ VectorView bias) {
  const int64_t column = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (column >= n) return;
  const float addend = element_or_zero(bias, column);
  for (int64_t token = blockIdx.y; token < m; token += gridDim.y) {
    T& at = y[token * y_stride + column];
    at = from_float<T>(to_float(at) + addend);
  }
}

void add_bias(const Sparse24Product& product, cudaStream_t stream) {
  constexpr int64_t kMaxBlocks = 1024;  // along the tokens; 65535 is the most that a grid has
  const dim3 grid(static_cast<unsigned>(blocks_along(product.n, kThreads)),
                  static_cast<unsigned>(std::min(product.m, kMaxBlocks)));
  dispatch_element(product.y_dtype, [&](auto element) {
    using T = decltype(element);
    launch(sparse24_bias_kernel<T>, grid, dim3(kThreads), 0, stream, static_cast<T*>(product.y),
           product.y_stride, product.m, product.n, product.bias);
  });
}

}  // namespace

void sparse24_linear_dense(const Sparse24Product& product, const Tensor& x, const Tensor& y) {
  const int64_t n = product.n, k = product.k, bytes = size_of(product.y_dtype);
  const cudaStream_t stream = current_stream(x);
  const int64_t rows_at_once =
      int4_rows_at_once(n, k * bytes / 2, device_properties(x).workspace_limit);
  const Tensor weight = torch::stable::new_empty(x, {rows_at_once, k});
  for (int64_t n0 = 0; n0 < n; n0 += rows_at_once) {
    const int64_t count = std::min(rows_at_once, n - n0);
    const Tensor part = slice(weight, 0, 0, count);
    sparse24_decompress_matrix(static_cast<const uint8_t*>(product.values) + n0 * (k / 2) * bytes,
                               product.meta + n0 * sparse24_meta_bytes(k), count, k,
                               static_cast<int>(bytes), write_pointer<void>(part), stream);
    multiply_transposed(x, part, slice(y, 1, n0, count));
  }
  if (product.bias.data) add_bias(product, stream);
}

}  // namespace pumice::cuda
