// kernel: sparse24_weight
//
// 2:4 matrices and dense ones: once for a weight, but for decompression, which may come before a
// dense product. Bound by bytes: a dense row and half of one, and metadata; 8192 × 8192 of 16 bit:
// 210 MB, 44 µs at the 4.8 TB/s of an H200, 63 at the 3.35 of an H100; expected 70 % of that. A
// group has a thread, whose loads are of single elements where a tensor does not begin on a
// boundary of two.
#include <algorithm>

#include "common/sparse24_layout.h"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "cuda/ptx/store.h"
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

// function(row, group) for every group of a matrix, neighbours by neighbouring threads. Rows lie
// along the grid's y, so that no index is divided, which would take as long as the memory does.
template <class Function>
__device__ __forceinline__ void for_each_group(int64_t n, int64_t k, Function&& function) {
  for (int64_t row = blockIdx.y; row < n; row += gridDim.y) {
    for (int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
         group < k / kSparse24Group; group += static_cast<int64_t>(gridDim.x) * kThreads) {
      function(row, group);
    }
  }
}

dim3 grid_of_groups(int64_t n, int64_t k) {
  constexpr int64_t kMaxRows = 65535;  // of a grid, along y
  const int64_t blocks = (k / kSparse24Group + kThreads - 1) / kThreads;
  return dim3(static_cast<unsigned>(std::min(blocks, kMaxBlocks)),
              static_cast<unsigned>(std::min(n, kMaxRows)));
}

__device__ __forceinline__ uint32_t nibble_at(const uint8_t* meta, int64_t k, int64_t row,
                                              int64_t group) {
  return meta[row * sparse24_meta_bytes(k) + group / 2] >> (group % 2 * 4) & 15;
}

template <class Bits>
__global__ void __launch_bounds__(kThreads)
    sparse24_weight_gather(const Bits* w, const uint8_t* meta, int64_t n, int64_t k, Bits* values) {
  for_each_group(n, k, [&](int64_t row, int64_t group) {
    const uint32_t nibble = nibble_at(meta, k, row, group);
    const Bits* columns = w + row * k + group * kSparse24Group;
    *reinterpret_cast<Neighbours<Bits, 2>*>(values + row * (k / 2) + 2 * group) = {
        {columns[nibble & 3], columns[nibble >> 2]}};
  });
}

// kPairs: the two values of a group lie on a boundary of their size.
template <class Bits, bool kPairs>
__global__ void __launch_bounds__(kThreads)
    sparse24_weight_decompress(const Bits* values, const uint8_t* meta, int64_t n, int64_t k,
                               Bits* w) {
  for_each_group(n, k, [&](int64_t row, int64_t group) {
    const uint32_t nibble = nibble_at(meta, k, row, group);
    const Bits* from = values + row * (k / 2) + 2 * group;
    Neighbours<Bits, 2> kept{};
    if constexpr (kPairs) {
      kept = *reinterpret_cast<const Neighbours<Bits, 2>*>(from);
    } else {
      kept = {{from[0], from[1]}};
    }
    const auto column = [&](uint32_t c) -> uint32_t {
      return (nibble & 3) == c ? kept.at[0] : nibble >> 2 == c ? kept.at[1] : 0;
    };
    Bits* to = w + row * k + group * kSparse24Group;
    if constexpr (sizeof(Bits) == 4) {
      ptx::store_16(to, {column(0), column(1), column(2), column(3)});
    } else if constexpr (sizeof(Bits) == 2) {
      ptx::store_8(to, {column(0) | column(1) << 16, column(2) | column(3) << 16});
    } else {
      *reinterpret_cast<uint32_t*>(to) =
          column(0) | column(1) << 8 | column(2) << 16 | column(3) << 24;
    }
  });
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
    launch(sparse24_weight_gather<Bits>, grid_of_groups(n, k), dim3(kThreads), 0, stream,
           static_cast<const Bits*>(w), meta, n, k, static_cast<Bits*>(values));
  });
}

void sparse24_decompress_matrix(const void* values, const uint8_t* meta, int64_t n, int64_t k,
                                int bytes, void* w, cudaStream_t stream) {
  with_element_bits(bytes, [&](auto bits) {
    using Bits = decltype(bits);
    const bool pairs = reinterpret_cast<uintptr_t>(values) % (2 * sizeof(Bits)) == 0;
    launch(pairs ? sparse24_weight_decompress<Bits, true> : sparse24_weight_decompress<Bits, false>,
           grid_of_groups(n, k), dim3(kThreads), 0, stream, static_cast<const Bits*>(values), meta,
           n, k, static_cast<Bits*>(w));
  });
}

}  // namespace pumice::cuda
