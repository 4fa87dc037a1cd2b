// kernel: sparse24_weight
//
// 2:4 matrices and dense ones: once for a weight, but for decompression, which may come before a
// dense product. Bound by bytes: a dense row and half of one, and metadata; 8192 × 8192 of 16 bit:
// 210 MB, 58 µs at 3.6 TB/s both ways, of which some 70 % are expected: a thread's loads are two
// bytes each, for a tensor may begin anywhere.
#include <algorithm>

#include "common/sparse24_layout.h"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "cuda/sparse/sparse24_weight.h"

namespace pumice::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 20;
constexpr int kGroupsOfWord = 8;

// Elements that one thread writes; outputs are torch's own, and so are aligned.
template <class Bits, int kCount>
struct alignas(kCount * sizeof(Bits)) Neighbours {
  Bits at[kCount];
};

// The groups of a word of meta, by one thread.
template <class Bits>
__global__ void __launch_bounds__(kThreads)
    sparse24_weight_compress(const Bits* w, int64_t n, int64_t k, uint32_t magnitude, Bits* values,
                             uint32_t* meta) {
  const int64_t words = sparse24_meta_bytes(k) / 4;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n * words;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = i / words, first = i % words * kGroupsOfWord;
    uint32_t word = 0;
#pragma unroll
    for (int g = 0; g < kGroupsOfWord; ++g) {
      const int64_t column = (first + g) * kSparse24Group;
      uint32_t nibble = kSparse24Filler;
      if (column < k) {
        const Bits* group = w + row * k + column;
        uint32_t nonzeros = 0;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          nonzeros |= static_cast<uint32_t>((group[c] & magnitude) != 0) << c;
        }
        const uint32_t lowest = nonzeros & (0u - nonzeros), rest = nonzeros ^ lowest;
        nibble = sparse24_group(lowest | (rest & (0u - rest)));
        *reinterpret_cast<Neighbours<Bits, 2>*>(values + row * (k / 2) + column / 2) = {
            {group[nibble & 3], group[nibble >> 2]}};
      }
      word |= nibble << (4 * g);
    }
    meta[i] = word;
  }
}

__device__ __forceinline__ uint32_t nibble_at(const uint8_t* meta, int64_t meta_bytes, int64_t row,
                                              int64_t group) {
  return meta[row * meta_bytes + group / 2] >> (group % 2 * 4) & 15;
}

// A group by one thread.
template <class Bits>
__global__ void __launch_bounds__(kThreads)
    sparse24_weight_gather(const Bits* w, const uint8_t* meta, int64_t n, int64_t k, Bits* values) {
  const int64_t groups = k / kSparse24Group;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n * groups;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const uint32_t nibble = nibble_at(meta, sparse24_meta_bytes(k), i / groups, i % groups);
    const Bits* group = w + i * kSparse24Group;
    *reinterpret_cast<Neighbours<Bits, 2>*>(values +
                                            2 * i) = {{group[nibble & 3], group[nibble >> 2]}};
  }
}

template <class Bits>
__global__ void __launch_bounds__(kThreads)
    sparse24_weight_decompress(const Bits* values, const uint8_t* meta, int64_t n, int64_t k,
                               Bits* w) {
  const int64_t groups = k / kSparse24Group;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n * groups;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const uint32_t nibble = nibble_at(meta, sparse24_meta_bytes(k), i / groups, i % groups);
    const Bits first = values[2 * i], second = values[2 * i + 1];
    Neighbours<Bits, 4> group{};
#pragma unroll
    for (uint32_t c = 0; c < 4; ++c) {
      group.at[c] = (nibble & 3) == c ? first : nibble >> 2 == c ? second : Bits{0};
    }
    *reinterpret_cast<Neighbours<Bits, 4>*>(w + i * kSparse24Group) = group;
  }
}

dim3 blocks_for(int64_t items) {
  return dim3(static_cast<unsigned>(std::min((items + kThreads - 1) / kThreads, kMaxBlocks)));
}

// function(Bits{}) for the unsigned integer of so many bytes.
template <class Function>
void with_element_bits(int bytes, Function&& function) {
  switch (bytes) {
    case 1:
      return function(uint8_t{});
    case 2:
      return function(uint16_t{});
    default:
      return function(uint32_t{});
  }
}

}  // namespace

void sparse24_compress_matrix(const void* w, int64_t n, int64_t k, Sparse24Elements elements,
                              void* values, uint8_t* meta, cudaStream_t stream) {
  with_element_bits(elements.bytes, [&](auto bits) {
    using Bits = decltype(bits);
    launch(sparse24_weight_compress<Bits>, blocks_for(n * sparse24_meta_bytes(k) / 4),
           dim3(kThreads), 0, stream, static_cast<const Bits*>(w), n, k, elements.magnitude,
           static_cast<Bits*>(values), reinterpret_cast<uint32_t*>(meta));
  });
}

void sparse24_gather_matrix(const void* w, const uint8_t* meta, int64_t n, int64_t k, int bytes,
                            void* values, cudaStream_t stream) {
  with_element_bits(bytes, [&](auto bits) {
    using Bits = decltype(bits);
    launch(sparse24_weight_gather<Bits>, blocks_for(n * k / kSparse24Group), dim3(kThreads), 0,
           stream, static_cast<const Bits*>(w), meta, n, k, static_cast<Bits*>(values));
  });
}

void sparse24_decompress_matrix(const void* values, const uint8_t* meta, int64_t n, int64_t k,
                                int bytes, void* w, cudaStream_t stream) {
  with_element_bits(bytes, [&](auto bits) {
    using Bits = decltype(bits);
    launch(sparse24_weight_decompress<Bits>, blocks_for(n * k / kSparse24Group), dim3(kThreads), 0,
           stream, static_cast<const Bits*>(values), meta, n, k, static_cast<Bits*>(w));
  });
}

}  // namespace pumice::cuda
