// kernel: sparse24_fp32
//
// The 2:4 product of fp32, in fp32: there are no tensor cores for it (TF32 keeps 10 of 23 bits). A
// warp has 4 rows of the weight and up to 8 tokens; a lane takes a group of four columns, puts the
// two kept values of each row to their places among four, two of them zero, and multiplies these
// with the group of each token: four FFMA for a token, where selecting from x what is kept would
// take two, and four selections.
//
// Few tokens: N·K·(2 + 1/8) bytes, 1.88 times fewer than dense; 8192 × 8192: 143 MB, 30 µs at the
// 4.8 TB/s of an H200, 43 µs at the 3.35 of an H100 (dense 56 and 80 µs). Counted in the machine
// code, 128 groups take a warp 110, 132, 179 and 288 instructions with 1, 2, 4 and 8 tokens: as an
// SM issues four in a clock, enough for 2.2, 1.8, 1.4 and 0.8 times the 18 bytes that arrive at it
// on an H200. A warp has 4.3 KB of weights under way (1.1 KB with 8 tokens), an SM 70 KB (17).
// Expected 85 % of the bandwidth up to 4 tokens, 60 % at 8.
//
// More tokens: 9 instructions for each group, row and token, twice the time of cuBLAS's dense
// product at 80 % of its peak; from some 16 tokens on a dense weight is faster, and soon a
// decompressed one, too (sparse24_dense_from). None of this is measured.
#include <algorithm>

#include "cuda/element.h"
#include "cuda/launch.h"
#include "cuda/sparse/sparse24_gemm.h"

namespace pumice::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kRows = 4;  // of a warp

struct Fp32Grid {
  int tiles_m;
  int warps_k;  // of a block's warps so many share rows, and have a piece of K each
  int piece;    // groups
  int rows_of_block() const { return kWarps / warps_k * kRows; }
};

// Of a group of columns, the kept values of the warp's rows and where they stood.
struct KeptGroups {
  float2 values[kRows];
  uint32_t places[kRows];
};

template <int kTokens>
__global__ void __launch_bounds__(kThreads, 2)
    sparse24_fp32_kernel(const __grid_constant__ Sparse24Product product,
                         const __grid_constant__ Fp32Grid grid) {
  constexpr int kOutputs = kRows * kTokens;  // of a warp, at most one for each lane
  static_assert(kOutputs <= kWarpSize);
  [[maybe_unused]] constexpr int kUnroll =
      kTokens <= 2 ? 4 : 8 / kTokens;  // loads of so many steps at once
  const int warp_rows = kWarps / grid.warps_k;
  const int warp_row = warp_index() / grid.warps_k, warp_k = warp_index() % grid.warps_k;
  const int m0 = static_cast<int>(blockIdx.x) % grid.tiles_m * kTokens;
  const int block_n0 = static_cast<int>(blockIdx.x) / grid.tiles_m * warp_rows * kRows;
  const int m = static_cast<int>(product.m), n = static_cast<int>(product.n);
  const int lane = lane_index(), groups = static_cast<int>(product.k / kSparse24Group);

  // From the first row and token on: offsets take half the registers of pointers. What does not
  // exist is the last row or token once more.
  const int n0 = min(block_n0 + warp_row * kRows, n - 1);
  const auto meta_bytes = static_cast<int>(sparse24_meta_bytes(product.k));
  const float2* values = static_cast<const float2*>(product.values) + int64_t{n0} * groups;
  const uint8_t* meta = product.meta + int64_t{n0} * meta_bytes;
  const float4* x0 = static_cast<const float4*>(product.x) + int64_t{m0} * groups;
  int row_groups[kRows], row_meta[kRows], token_groups[kTokens];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = min(r, n - 1 - n0);
    row_groups[r] = row * groups;
    row_meta[r] = row * meta_bytes;
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) token_groups[t] = min(t, m - 1 - m0) * groups;
  const auto load = [&](int g) {
    KeptGroups kept;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      kept.values[r] = values[row_groups[r] + g];
      kept.places[r] = uint32_t{meta[row_meta[r] + g / 2]} >> (g % 2 * 4);
    }
    return kept;
  };

  float sum[kTokens][kRows] = {};
  const int piece = grid.piece;
  const int end = min((warp_k + 1) * piece, groups);
#pragma unroll kUnroll
  for (int g = warp_k * piece + lane; g < end; g += kWarpSize) {
    const KeptGroups kept = load(g);
    float4 x[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) x[t] = x0[token_groups[t] + g];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float a = kept.values[r].x, b = kept.values[r].y;
      const uint32_t first = kept.places[r] & 3, second = kept.places[r] >> 2 & 3;
      const float w0 = first == 0 ? a : 0.0f, w3 = second == 3 ? b : 0.0f;
      const float w1 = first == 1 ? a : second == 1 ? b : 0.0f;
      const float w2 = first == 2 ? a : second == 2 ? b : 0.0f;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        float total = fmaf(w0, x[t].x, sum[t][r]);
        total = fmaf(w1, x[t].y, total);
        total = fmaf(w2, x[t].z, total);
        sum[t][r] = fmaf(w3, x[t].w, total);
      }
    }
  }

  float own = 0.0f;  // output `lane` of the warp
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    float total = sum[i / kRows][i % kRows];
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      total += __shfl_xor_sync(kFullWarp, total, offset);
    }
    if (lane == i) own = total;
  }
  float* sums = dynamic_shared_memory<float>();  // [warp][output]
  if (lane < kOutputs) sums[warp_index() * kOutputs + lane] = own;
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= warp_rows * kOutputs) return;
  const int output = thread % kOutputs;
  const float* first = sums + thread / kOutputs * grid.warps_k * kOutputs + output;
  float total = 0.0f;
  for (int w = 0; w < grid.warps_k; ++w) total += first[w * kOutputs];
  const int token = m0 + output / kRows;
  const int row = block_n0 + thread / kOutputs * kRows + output % kRows;
  if (token >= m || row >= n) return;
  static_cast<float*>(product.y)[token * product.y_stride + row] =
      total + element_or_zero(product.bias, row);
}

template <int kTokens>
void launch_fp32(const Sparse24Product& product, int sm_count, cudaStream_t stream) {
  Fp32Grid grid{static_cast<int>(blocks_along(product.m, kTokens)), 1, 0};
  const auto blocks = [&] {
    return blocks_along(product.n, grid.rows_of_block()) * int64_t{grid.tiles_m};
  };
  while (grid.warps_k < kWarps && blocks() < 2 * sm_count) grid.warps_k *= 2;
  grid.piece = kWarpSize *
               static_cast<int>(blocks_along(product.k / kSparse24Group, grid.warps_k * kWarpSize));
  STD_TORCH_CHECK(blocks() <= INT32_MAX, "pumice: a 2:4 product of ", product.m, " × ", product.n,
                  " outputs is too large for one launch");
  launch(sparse24_fp32_kernel<kTokens>, dim3(static_cast<unsigned>(blocks())), dim3(kThreads),
         kWarps * kRows * kTokens * sizeof(float), stream, product, grid);
}

}  // namespace

void sparse24_gemm_fp32(const Sparse24Product& product, int sm_count, cudaStream_t stream) {
  if (product.m == 1) return launch_fp32<1>(product, sm_count, stream);
  if (product.m == 2) return launch_fp32<2>(product, sm_count, stream);
  if (product.m <= 4) return launch_fp32<4>(product, sm_count, stream);
  launch_fp32<8>(product, sm_count, stream);
}

}  // namespace pumice::cuda
