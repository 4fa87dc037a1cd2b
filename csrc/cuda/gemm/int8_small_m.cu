// kernel: int8_small_m
//
// y = weight_scale·Σ x·weight + bias for up to 32 tokens: the time is that of reading the weights.
//
// The weights are the A operand of the mma (16 rows of N), the tokens the B operand (8 of them). As
// a sum does not mind its order, K is permuted, for both alike, to the order in which it lies in
// memory: a lane reads 16 neighbouring weights of its row with one load, and the 16 elements of x
// that belong to them, and these are its operands of four mmas (two, if x is int8). Nothing goes
// through shared memory on the way.
//
//   lane (g, t)  =  weight rows g and g + 8, token g, elements 16·t .. 16·t + 15 of the warp's 64
//
// The 8 warps of a block share its rows and split K, 64 at a time by turns: a block reads 512
// neighbouring bytes of each row at once. Their sums are added in a fixed order at the end.
//
// Floor: N·K bytes of weights: 8192 × 8192 in 15.6 µs at 4.3 TB/s, bf16 weights 31.2 µs. Expected
// 80 % of that rate (19-20 µs): 2 blocks · 8 warps · kDepth 3 · 2 KB = 96 KB an SM are under way,
// where Little's law asks for 26 KB; widening takes 30 % of the issue slots; x comes from L2, at M
// ≤ 8 half as many bytes as weights. At M = 32 it is as many, and L2 is the limit: some 24 µs.
//
// fp32 x is multiplied as the sum of two bf16; int8 x (int8_linear) as int8, exactly.
#include <algorithm>
#include <type_traits>

#include "cuda/element.h"
#include "cuda/gemm/float_fragment.h"
#include "cuda/gemm/int8_gemm.h"
#include "cuda/gemm/int8_widen.h"
#include "cuda/gemm/unaligned.h"
#include "cuda/launch.h"
#include "cuda/ptx/load.h"
#include "cuda/ptx/mma.h"

namespace pumice::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kLaneK = 16;  // elements of K of a lane, one 16-byte load of weights
constexpr int kWarpK = 4 * kLaneK;
constexpr int kTokensOfTile = 8;
constexpr int kRowsOfTile = 16;

struct SmallProduct {
  Int8Product product;
  const void* x;       // [m, k]
  const float* scale;  // of the tokens, if x is int8
  int64_t scale_stride;
};

template <class X>
using Sum = std::conditional_t<std::is_same_v<X, int8_t>, int32_t, float>;

// 16 elements of one token, as loaded.
template <class X>
struct TokenSlice {
  static constexpr int kVectors = kLaneK * sizeof(X) / 16;
  uint4 vector[kVectors];

  template <bool kAligned>
  __device__ __forceinline__ void load(const X* x, int left) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const X* source = x + i * (16 / sizeof(X));
      const int bytes = left * static_cast<int>(sizeof(X)) - i * 16;
      if constexpr (kAligned) {
        vector[i] = bytes > 0 ? *reinterpret_cast<const uint4*>(source) : uint4{};
      } else {
        vector[i] = load_unaligned_16(source, bytes);
      }
    }
  }

  __device__ __forceinline__ uint32_t word(int i) const {
    const uint4& v = vector[i / 4];
    return i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
  }
};

__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// B operand number `step` of 4 from the elements 4·step .. of a token.
template <class X>
__device__ __forceinline__ void token_operand(const TokenSlice<X>& slice, int step,
                                              uint32_t (&high)[2], uint32_t (&low)[2]) {
  if constexpr (kIsSplit<X>) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const SplitBits first = split_bits(__uint_as_float(slice.word(4 * step + 2 * i)));
      const SplitBits second = split_bits(__uint_as_float(slice.word(4 * step + 2 * i + 1)));
      high[i] = first.high | second.high << 16;
      low[i] = first.low | second.low << 16;
    }
  } else {
    high[0] = slice.word(2 * step);
    high[1] = slice.word(2 * step + 1);
  }
}

// The weights of the warp's 64 elements of K. Rows beyond the last are the last once more: nobody
// looks at their sums.
template <int kRowTiles, bool kAligned>
struct WeightPiece {
  uint4 rows[kRowTiles][2];

  // Beyond the end of K it is the end once more, which meets zeros of x.
  __device__ __forceinline__ void load(const int8_t* const (&sources)[kRowTiles][2], int k,
                                       int size_k) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (kAligned) {
          rows[r][half] = ptx::load_streaming_16(sources[r][half] + min(k, size_k - kLaneK));
        } else {
          rows[r][half] = load_unaligned_16(sources[r][half] + k, size_k - k);
        }
      }
    }
  }
};

// The same of the tokens; beyond the last, the last once more.
template <class X, int kTokenTiles, bool kAligned>
struct TokenPiece {
  TokenSlice<X> slice[kTokenTiles];

  __device__ __forceinline__ void load(const X* const (&sources)[kTokenTiles], int k, int size_k) {
#pragma unroll
    for (int g = 0; g < kTokenTiles; ++g) {
      slice[g].template load<kAligned>(sources[g] + k, size_k - k);
    }
  }
};

template <class X, int kTokenTiles, int kRowTiles, bool kAligned>
__device__ __forceinline__ void multiply(const WeightPiece<kRowTiles, kAligned>& weight,
                                         const TokenPiece<X, kTokenTiles, kAligned>& token,
                                         Sum<X> (&sum)[kRowTiles][kTokenTiles][4]) {
  if constexpr (std::is_same_v<X, int8_t>) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const auto& rows = weight.rows[r];
        const uint32_t a[4] = {word_of(rows[0], 2 * step), word_of(rows[1], 2 * step),
                               word_of(rows[0], 2 * step + 1), word_of(rows[1], 2 * step + 1)};
#pragma unroll
        for (int g = 0; g < kTokenTiles; ++g) {
          const uint32_t b[2] = {token.slice[g].word(2 * step), token.slice[g].word(2 * step + 1)};
          ptx::mma_m16n8k32_s8(sum[r][g], a, b);
        }
      }
    }
  } else {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t b[kTokenTiles][2], b_low[kTokenTiles][2];
#pragma unroll
      for (int g = 0; g < kTokenTiles; ++g) token_operand(token.slice[g], step, b[g], b_low[g]);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        uint32_t a[4];
        widen_int8x4<Multiplicand<X>>(word_of(weight.rows[r][0], step), a[0], a[2]);
        widen_int8x4<Multiplicand<X>>(word_of(weight.rows[r][1], step), a[1], a[3]);
#pragma unroll
        for (int g = 0; g < kTokenTiles; ++g) {
          mma_16bit<X>(sum[r][g], a, b[g]);
          if constexpr (kIsSplit<X>) mma_16bit<X>(sum[r][g], a, b_low[g]);
        }
      }
    }
  }
}

// Two where the registers allow it.
template <class X, int kTokenTiles>
constexpr int kBlocksPerSm = kTokenTiles == 4 || kIsSplit<X> ? 1 : 2;

// How many pieces a warp has under way: as many as fit its registers beside the sums and what the
// compiler loads ahead of them. Splitting fp32 takes some, too.
template <class X, int kTokenTiles, int kRowTiles, bool kAligned>
constexpr int kPieceDepth = [] {
  if (!kAligned) return 1;
  const int registers =
      kRowTiles * kLaneK / 2 + kTokenTiles * kLaneK * static_cast<int>(sizeof(X)) / 4;
  const int budget = kTokenTiles == 4 ? 128 : 76;
  return std::clamp(budget / registers, 1, 4);
}();

// Partial sums in shared memory, [warp][token][row]: 4 words of padding put the 4 token pairs that
// a warp stores at once, and its 8 rows, into different banks.
template <int kTokenTiles, int kRowTiles>
struct Partials {
  static constexpr int kRows = kRowTiles * kRowsOfTile;
  static constexpr int kTokens = kTokenTiles * kTokensOfTile;
  static constexpr int kTokenStride = kRows + 4;
  static constexpr int kWarpStride = kTokens * kTokenStride;
  static constexpr size_t kBytes = size_t{kWarps} * kWarpStride * 4;
};

template <class X, int kTokenTiles, int kRowTiles, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<X, kTokenTiles>)
    int8_small_m_kernel(const __grid_constant__ SmallProduct args) {
  using PartialSums = Partials<kTokenTiles, kRowTiles>;
  constexpr int kDepth = kPieceDepth<X, kTokenTiles, kRowTiles, kAligned>;
  const Int8Product& product = args.product;
  const int group = lane_index() / 4, t = lane_index() % 4;
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * PartialSums::kRows;
  const int64_t m0 = static_cast<int64_t>(blockIdx.y) * PartialSums::kTokens;

  const int8_t* weight_rows[kRowTiles][2];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t n = min(n0 + r * kRowsOfTile + half * 8 + group, product.n - 1);
      weight_rows[r][half] = product.weight + n * product.k;
    }
  }
  const X* tokens[kTokenTiles];
#pragma unroll
  for (int g = 0; g < kTokenTiles; ++g) {
    const int64_t m = min(m0 + g * kTokensOfTile + group, product.m - 1);
    tokens[g] = static_cast<const X*>(args.x) + m * product.k;
  }

  Sum<X> sum[kRowTiles][kTokenTiles][4] = {};
  WeightPiece<kRowTiles, kAligned> weight[kDepth];
  TokenPiece<X, kTokenTiles, kAligned> token[kDepth];
  constexpr int kStep = kWarps * kWarpK;
  const int size_k = static_cast<int>(product.k);
  int warp_k = warp_index() * kWarpK;
  const int lane_k = t * kLaneK;
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    weight[d].load(weight_rows, warp_k + d * kStep + lane_k, size_k);
    token[d].load(tokens, warp_k + d * kStep + lane_k, size_k);
  }
#pragma unroll 1
  while (warp_k < size_k) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      // Also a border that the compiler does not put the loads off beyond.
      if (warp_k >= size_k) break;
      multiply(weight[d], token[d], sum);
      weight[d].load(weight_rows, warp_k + kDepth * kStep + lane_k, size_k);
      token[d].load(tokens, warp_k + kDepth * kStep + lane_k, size_k);
      warp_k += kStep;
    }
  }

  Sum<X>* partials = dynamic_shared_memory<Sum<X>>();
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int g = 0; g < kTokenTiles; ++g) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int row = r * kRowsOfTile + c / 2 * 8 + group;
        const int token = g * kTokensOfTile + 2 * t + c % 2;
        partials[warp_index() * PartialSums::kWarpStride + token * PartialSums::kTokenStride +
                 row] = sum[r][g][c];
      }
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < PartialSums::kTokens * PartialSums::kRows;
       i += kThreads) {
    const int token = i / PartialSums::kRows;
    const int row = i % PartialSums::kRows;
    const int64_t m = m0 + token, n = n0 + row;
    if (m >= product.m || n >= product.n) continue;
    Sum<X> total = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      total += partials[warp * PartialSums::kWarpStride + token * PartialSums::kTokenStride + row];
    }
    float y = static_cast<float>(total);
    if constexpr (std::is_same_v<X, int8_t>) y *= args.scale[m * args.scale_stride];
    y = y * product.weight_scale[n * product.weight_scale_stride] +
        element_or_zero(product.bias, n);
    store_element(product.y, product.y_dtype, m * product.n + n, y);
  }
}

template <class X, int kTokenTiles, int kRowTiles, bool kAligned>
void launch_small(const SmallProduct& args, cudaStream_t stream) {
  using PartialSums = Partials<kTokenTiles, kRowTiles>;
  const auto blocks_n =
      static_cast<unsigned>((args.product.n + PartialSums::kRows - 1) / PartialSums::kRows);
  const auto blocks_m =
      static_cast<unsigned>((args.product.m + PartialSums::kTokens - 1) / PartialSums::kTokens);
  launch(int8_small_m_kernel<X, kTokenTiles, kRowTiles, kAligned>, dim3(blocks_n, blocks_m),
         dim3(kThreads), PartialSums::kBytes, stream, args);
}

// As many rows a block as keep most SMs busy: more rows read x fewer times.
template <class X, int kTokenTiles, int kFewRowTiles>
void launch_rows(const SmallProduct& args, const Int8Device& device, cudaStream_t stream) {
  constexpr int kManyRowTiles = 2 * kFewRowTiles;
  const int64_t blocks = (args.product.n - 1) / (kManyRowTiles * kRowsOfTile) + 1;
  if (4 * blocks >= 3 * device.sm_count) {
    return launch_small<X, kTokenTiles, kManyRowTiles, true>(args, stream);
  }
  launch_small<X, kTokenTiles, kFewRowTiles, true>(args, stream);
}

template <class X>
void launch_tokens(const SmallProduct& args, const Int8Device& device, cudaStream_t stream) {
  const Int8Product& product = args.product;
  const bool aligned = rows_are_aligned_16(product.weight, product.k) &&
                       rows_are_aligned_16(args.x, product.k * static_cast<int64_t>(sizeof(X)));
  // Element by element it is slow in any case: one tile shape will do.
  if (!aligned) return launch_small<X, kIsSplit<X> ? 2 : 4, 2, false>(args, stream);
  if (product.m <= 8) return launch_rows<X, 1, 1>(args, device, stream);
  // fp32 tokens fill the registers at 16: 32 of them take two blocks, the second of which finds the
  // weights in L2.
  if (product.m <= 16 || kIsSplit<X>) return launch_rows<X, 2, 1>(args, device, stream);
  if constexpr (!kIsSplit<X>) launch_rows<X, 4, 2>(args, device, stream);
}

}  // namespace

void int8_small_m(const Int8Product& product, const Int8Tokens& tokens, const Int8Device& device,
                  cudaStream_t stream) {
  launch_tokens<int8_t>({product, tokens.q, tokens.scale, tokens.scale_stride}, device, stream);
}

void int8_small_m(const Int8Product& product, const void* x, DType x_dtype,
                  const Int8Device& device, cudaStream_t stream) {
  dispatch_element(x_dtype, [&](auto element) {
    launch_tokens<decltype(element)>({product, x, nullptr, 0}, device, stream);
  });
}

}  // namespace pumice::cuda
