// kernel: int4_weight
//
// Packing, unpacking and dequantization of whole weights, of 2, 3, 4 and 8 bits: one pass each,
// bound by memory.
//
// A thread makes one packed word (packing) or eight neighbouring values of a row (the others), so
// that a warp reads and writes neighbouring bytes: with 16-bit output 128 bytes of 4-bit weights
// in, 512 bytes out, 16 of them a thread. The grid has rows along y and no division per element.
//
// Floor of the dequantization of 8192 × 8192 to 16 bits: 34 + 134 MB at 4.3 TB/s = 39 µs; expected
// 85 % of that rate, for 48 warps on an SM (40 registers) each have a load or a store under way.
#include "cuda/quantize/int4_weight.h"

#include <algorithm>

#include "cuda/intn_window.h"
#include "cuda/launch.h"
#include "cuda/ptx/store.h"

namespace pumice::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxGridY = 65535;

// A thread for each of `units` pieces of each of n rows; the kernel strides over rows beyond the
// grid's limit.
dim3 grid_of(int64_t units, int64_t n) {
  return dim3(static_cast<unsigned>((units + kThreads - 1) / kThreads),
              static_cast<unsigned>(std::min(n, kMaxGridY)));
}

__device__ __forceinline__ int64_t unit_index() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

template <int kBits>
__global__ void __launch_bounds__(kThreads)
    int4_weight_pack(const uint8_t* q, int64_t n, int64_t k, bool aligned, uint32_t* qweight,
                     uint32_t* too_large) {
  constexpr int kValues = 32 / kBits;  // of a word, where none lies across two
  const int64_t words = intn_words(k, kBits);
  const int64_t word = unit_index();
  if (word >= words) return;
  uint32_t seen = 0;
  for (int64_t row = blockIdx.y; row < n; row += gridDim.y) {
    const uint8_t* values = q + row * k;
    uint32_t packed = 0;
    if (!IntnLayout<kBits>::kAcrossWords && aligned) {
      const auto* source = reinterpret_cast<const uint32_t*>(values + word * kValues);
#pragma unroll
      for (int i = 0; i < kValues / 4; ++i) {
        const uint32_t four = source[i];
        seen |= four;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          packed |= (four >> (8 * j) & IntnLayout<kBits>::kMask) << ((4 * i + j) * kBits);
        }
      }
    } else {
      packed = intn_word<kBits>(values, k, word);
      const int64_t begin = word * 32 / kBits, end = min(k, (word * 32 + 31) / kBits + 1);
      for (int64_t i = begin; i < end; ++i) seen |= values[i];
    }
    qweight[row * words + word] = packed;
  }
  if (seen & (0x01010101u * (0xffu & ~IntnLayout<kBits>::kMask))) atomicOr(too_large, 1u);
}

__global__ void __launch_bounds__(kThreads)
    int4_weight_unpack(const uint32_t* qweight, int64_t n, int64_t k, int bits, bool aligned,
                       uint8_t* q) {
  const int64_t words = intn_words(k, bits);
  const int64_t k0 = unit_index() * kWindowValues;
  if (k0 >= k) return;
  for (int64_t row = blockIdx.y; row < n; row += gridDim.y) {
    const uint64_t window = intn_window(qweight + row * words, words, unit_index(), bits);
    uint8_t* out = q + row * k + k0;
    if (aligned) {
      uint32_t halves[2] = {};
#pragma unroll
      for (int i = 0; i < kWindowValues; ++i) {
        halves[i / 4] |= window_value(window, i, bits) << (i % 4 * 8);
      }
      *reinterpret_cast<uint2*>(out) = {halves[0], halves[1]};
    } else {
#pragma unroll
      for (int i = 0; i < kWindowValues; ++i) {
        if (k0 + i < k) out[i] = static_cast<uint8_t>(window_value(window, i, bits));
      }
    }
  }
}

template <class T>
__device__ __forceinline__ uint32_t word_of(float first, float second) {
  return bits_as<uint16_t>(from_float<T>(first)) |
         static_cast<uint32_t>(bits_as<uint16_t>(from_float<T>(second))) << 16;
}

// Eight neighbours, 16 bytes at a time.
template <class T>
__device__ __forceinline__ void store_eight(T* target, const float (&w)[kWindowValues]) {
  if constexpr (sizeof(T) == 4) {
    auto* vectors = reinterpret_cast<float4*>(target);
    vectors[0] = {w[0], w[1], w[2], w[3]};
    vectors[1] = {w[4], w[5], w[6], w[7]};
  } else {
    ptx::store_16(target, {word_of<T>(w[0], w[1]), word_of<T>(w[2], w[3]), word_of<T>(w[4], w[5]),
                           word_of<T>(w[6], w[7])});
  }
}

// kAligned is no argument, as compilers merge the two ways to store, into single elements.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    int4_weight_dequantize(const __grid_constant__ IntnWeight weight, T* out, int64_t out_stride) {
  const int64_t k0 = unit_index() * kWindowValues;
  if (k0 >= weight.k) return;
  for (int64_t row = blockIdx.y; row < weight.n; row += gridDim.y) {
    float w[kWindowValues];
    dequantize_window(weight, row, unit_index(), w);
    T* target = out + row * out_stride + k0;
    if constexpr (kAligned) {
      store_eight(target, w);
    } else {
#pragma unroll
      for (int i = 0; i < kWindowValues; ++i) {
        if (k0 + i < weight.k) target[i] = from_float<T>(w[i]);
      }
    }
  }
}

bool is_aligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace

void pack_weight(const uint8_t* q, int64_t n, int64_t k, int bits, uint32_t* qweight,
                 uint32_t* too_large, cudaStream_t stream) {
  with_intn_width(bits, [&]<int kBits>() {
    const bool aligned = is_aligned(q, 4) && k % 4 == 0 && k * kBits % 32 == 0;
    launch(int4_weight_pack<kBits>, grid_of(intn_words(k, kBits), n), dim3(kThreads), 0, stream, q,
           n, k, aligned, qweight, too_large);
  });
}

void unpack_weight(const uint32_t* qweight, int64_t n, int64_t k, int bits, uint8_t* q,
                   cudaStream_t stream) {
  const bool aligned = is_aligned(q, 8) && k % kWindowValues == 0;
  launch(int4_weight_unpack, grid_of((k + kWindowValues - 1) / kWindowValues, n), dim3(kThreads), 0,
         stream, qweight, n, k, bits, aligned, q);
}

void dequantize_weight(const IntnWeight& weight, void* out, int64_t out_stride, DType out_dtype,
                       cudaStream_t stream) {
  dispatch_element(out_dtype, [&](auto element) {
    using T = decltype(element);
    const bool aligned =
        is_aligned(out, 16) && weight.k % kWindowValues == 0 && out_stride % kWindowValues == 0;
    launch(aligned ? int4_weight_dequantize<T, true> : int4_weight_dequantize<T, false>,
           grid_of((weight.k + kWindowValues - 1) / kWindowValues, weight.n), dim3(kThreads), 0,
           stream, weight, static_cast<T*>(out), out_stride);
  });
}

}  // namespace pumice::cuda
