// kernel: int4_prepare
//
// What int4_gemm needs beforehand, in one launch whose blocks do different things: x in 16 bit
// (fp32 as two bf16), in the order of perm, in aligned rows; x·lora_aᵀ; tickets set to zero.
//
// Copying x costs 4 bytes of traffic per element: for few tokens nothing but the launch, 2 µs; for
// M = 4096, K = 8192 it is 134 MB, 40 µs. Reading x through perm scatters the reads within a row,
// which the caches hold.
//
// A block makes 8 tokens' products with one row of lora_a, its threads at neighbouring values of K,
// and adds up in a fixed order. For many tokens that reads x as often as there are rows in lora_a,
// from L2: with 64 rows and M = 4096 some 1 ms, where a product on tensor cores would take 50 µs.
#include <algorithm>

#include "cuda/element.h"
#include "cuda/gemm/float_fragment.h"
#include "cuda/gemm/int4_gemm.h"
#include "cuda/launch.h"

namespace pumice::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBlocksPerSm = 4;    // told to ptxas, which spills for a fifth one
constexpr int kEight = 8;          // neighbours along K of a thread
constexpr int kTokensOfBlock = 8;  // of a low-rank product

// Eight neighbours as fp32; those from `valid` on are zero.
template <class T>
__device__ __forceinline__ void load_eight(const T* source, int64_t valid, bool aligned,
                                           float (&out)[kEight]) {
  if (aligned && valid >= kEight) {
    constexpr int kVectors = kEight * sizeof(T) / 16;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const uint4 loaded = reinterpret_cast<const uint4*>(source)[v];
      const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
          out[4 * v + i] = __uint_as_float(words[i]);
        } else {
          out[2 * i] = to_float(bits_as<T>(static_cast<uint16_t>(words[i])));
          out[2 * i + 1] = to_float(bits_as<T>(static_cast<uint16_t>(words[i] >> 16)));
        }
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kEight; ++i) out[i] = i < valid ? to_float(source[i]) : 0.0f;
  }
}

__device__ __forceinline__ void load_eight(const MatrixView& matrix, int64_t at, int64_t valid,
                                           bool aligned, float (&out)[kEight]) {
  switch (matrix.dtype) {
    case DType::kFloat16:
      return load_eight(static_cast<const __half*>(matrix.data) + at, valid, aligned, out);
    case DType::kBFloat16:
      return load_eight(static_cast<const __nv_bfloat16*>(matrix.data) + at, valid, aligned, out);
    default:
      return load_eight(static_cast<const float*>(matrix.data) + at, valid, aligned, out);
  }
}

// 16-bit bits of an element of x and of what they leave of it.
template <class T>
__device__ __forceinline__ SplitBits halves_of(T x) {
  if constexpr (kIsSplit<T>) {
    return split_bits(x);
  } else {
    return {bits_as<uint16_t>(x), 0};
  }
}

// The column of x that stands at place k of a rewritten row; -1 beyond them.
__device__ __forceinline__ int source_column(const Int4Preparation& p, int k) {
  const int width = static_cast<int>(p.k);
  if (k < width) return p.perm ? p.perm[k] : k;
  return k - width < static_cast<int>(p.appended) ? p.appended_idx[k - width] : -1;
}

template <class T>
__device__ __forceinline__ void rewrite_eight(const Int4Preparation& p, int64_t m, int64_t k0) {
  const T* row = static_cast<const T*>(p.x) + m * p.k;
  uint32_t high[4] = {}, low[4] = {};
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    const int column = source_column(p, static_cast<int>(k0) + i);
    if (column < 0) break;
    const SplitBits bits = halves_of(row[column]);
    high[i / 2] |= bits.high << (i % 2 * 16);
    low[i / 2] |= bits.low << (i % 2 * 16);
  }
  const int64_t vector = (m * p.stride + k0) / kEight;
  static_cast<uint4*>(p.high)[vector] = {high[0], high[1], high[2], high[3]};
  if (kIsSplit<T>) static_cast<uint4*>(p.low)[vector] = {low[0], low[1], low[2], low[3]};
}

// low_rank[m0 .. m0 + 7, r]. All threads of the block.
template <class T>
__device__ __forceinline__ void multiply_low_rank(const Int4Preparation& p, int64_t m0, int64_t r,
                                                  bool aligned, float* sums) {
  float sum[kTokensOfBlock] = {};
  for (int64_t k = static_cast<int64_t>(threadIdx.x) * kEight; k < p.k; k += kThreads * kEight) {
    float a[kEight];
    load_eight(p.lora_a, r * p.k + k, p.k - k, aligned, a);
#pragma unroll
    for (int token = 0; token < kTokensOfBlock; ++token) {
      if (m0 + token >= p.m) break;
      float x[kEight];
      load_eight(static_cast<const T*>(p.x) + (m0 + token) * p.k + k, p.k - k, aligned, x);
#pragma unroll
      for (int i = 0; i < kEight; ++i) sum[token] = fmaf(x[i], a[i], sum[token]);
    }
  }
#pragma unroll
  for (int token = 0; token < kTokensOfBlock; ++token) {
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      sum[token] += __shfl_xor_sync(kFullWarp, sum[token], distance);
    }
    if (lane_index() == 0) sums[warp_index() * kTokensOfBlock + token] = sum[token];
  }
  __syncthreads();
  const int token = static_cast<int>(threadIdx.x);
  if (token < kTokensOfBlock && m0 + token < p.m) {
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += sums[warp * kTokensOfBlock + token];
    p.low_rank[(m0 + token) * p.lora_a.rows + r] = total;
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    int4_prepare_kernel(const __grid_constant__ Int4Preparation p, int rewriting_blocks,
                        int64_t blocks_of_row, bool aligned) {
  const auto block = static_cast<int64_t>(blockIdx.x);
  for (int64_t i = block * kThreads + threadIdx.x; i < p.ticket_count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    p.tickets[i] = 0;
  }
  if (block < rewriting_blocks) {
    for (int64_t item = block; item < p.m * blocks_of_row; item += rewriting_blocks) {
      const int64_t k0 = (item % blocks_of_row * kThreads + threadIdx.x) * kEight;
      if (k0 < p.stride) rewrite_eight<T>(p, item / blocks_of_row, k0);
    }
    return;
  }
  if (p.low_rank == nullptr) return;
  const int64_t items = (p.m + kTokensOfBlock - 1) / kTokensOfBlock * p.lora_a.rows;
  const int64_t stride = static_cast<int64_t>(gridDim.x) - rewriting_blocks;
  for (int64_t item = block - rewriting_blocks; item < items; item += stride) {
    multiply_low_rank<T>(p, item / p.lora_a.rows * kTokensOfBlock, item % p.lora_a.rows, aligned,
                         dynamic_shared_memory<float>());
  }
}

bool is_aligned_16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

void int4_prepare(const Int4Preparation& p, int sm_count, cudaStream_t stream) {
  const int64_t limit = 8 * int64_t{sm_count};  // blocks that are resident at once
  const int64_t blocks_of_row = (p.stride + kThreads * kEight - 1) / (kThreads * kEight);
  const int64_t rewriting = p.high ? std::min(p.m * blocks_of_row, limit) : 0;
  const int64_t low_rank_items =
      p.low_rank ? (p.m + kTokensOfBlock - 1) / kTokensOfBlock * p.lora_a.rows : 0;
  const int64_t blocks = rewriting + std::min(low_rank_items, limit);
  const bool aligned = p.k % kEight == 0 && is_aligned_16(p.x) && is_aligned_16(p.lora_a.data);
  dispatch_element(p.dtype, [&](auto element) {
    launch(int4_prepare_kernel<decltype(element)>,
           dim3(static_cast<unsigned>(std::max<int64_t>(blocks, 1))), dim3(kThreads),
           kWarps * kTokensOfBlock * sizeof(float), stream, p, static_cast<int>(rewriting),
           blocks_of_row, aligned);
  });
}

}  // namespace pumice::cuda
