// The main loop of a warp for int4 values, which are widened to 16 bits on their way into mma.sp.
//
// A register of the A operand holds the two kept values of a group of four columns: the two nibbles
// of a byte. Lane (g, t) takes group t of the first 16 columns of a step and group t of the second:
// byte t of a word of row g and of the word after it. It reads both words whole, as its three
// neighbours do.
//
//   byte q1 q0  →  (q0 - zero, q1 - zero)    3 instructions in fp16: byte_perm, and, half2 fma
//
// Integers are multiplied, exactly, and a group's scale is applied in fp32 to its sum.
#pragma once

#include "cuda/ptx/lop3.h"
#include "cuda/sparse/sparse24_operands.h"

namespace pumice::cuda {

// What moves the raised nibbles of a row down to q - zero.
//
// fp16: bits 0x6400 | q are 1024 + q, and 0x6400 | q << 4, as the high nibble of the byte stands,
// 1024 + 16·q. In one fused operation (1024 + q)·1 - (1024 + zero) and (1024 + 16·q)/16 - (64 +
// zero) both become q - zero; 0xe400 | zero and 0xd400 | zero << 4 are the numbers to add.
// bf16: 0x4300 | q is 128 + q for q < 128 only, so the high nibble is shifted first.
template <class T>
__device__ __forceinline__ uint32_t sparse24_zero_pair(uint32_t zero) {
  if constexpr (std::is_same_v<T, __half>) return zero * 0x00100001u + 0xd400e400u;
  return zero * 0x00010001u + 0x43004300u;
}

// How byte t of a word is fetched for both halves of a pair: from the word and from what stands
// beside it, byte 4 of a constant (fp16) or byte t of the shifted word (bf16).
template <class T>
__device__ __forceinline__ uint32_t sparse24_byte_select(int t) {
  constexpr uint32_t kFirst = std::is_same_v<T, __half> ? 0x4040u : 0x0400u;
  return kFirst + static_cast<uint32_t>(t) * 0x0101u;
}

// The two values of a byte of a word.
__device__ __forceinline__ uint32_t sparse24_centred_pair(uint32_t word, uint32_t select,
                                                          uint32_t zeros, __half) {
  const uint32_t bytes = __byte_perm(word, 0x64646464u, select) & 0x64f0640fu;
  const __half2 factors = __floats2half2_rn(1.0f, 0.0625f);
  const __half2 product = __hmul2(bits_as<__half2>(bytes), factors);  // fused with the addition
  return bits_as<uint32_t>(__hadd2(product, bits_as<__half2>(zeros)));
}
__device__ __forceinline__ uint32_t sparse24_centred_pair(uint32_t word, uint32_t select,
                                                          uint32_t zeros, __nv_bfloat16) {
  const uint32_t nibbles = __byte_perm(word, word >> 4, select);
  const uint32_t raised = ptx::and_or(nibbles, 0x000f000fu, 0x43004300u);
  return bits_as<uint32_t>(
      __hsub2(bits_as<__nv_bfloat162>(raised), bits_as<__nv_bfloat162>(zeros)));
}

template <class T, class Tile>
class Sparse24Int4Warp {
 public:
  using Sum = float;
  static constexpr int kRowTiles = Tile::kRowTiles, kTokenTiles = Tile::kTokenTiles;

  __device__ Sparse24Int4Warp(const Sparse24Product& product, const Sparse24Grid& grid)
      : product_(product), grid_(grid) {}

  // The slices of [begin, end), of which the loader has started the first kStages - 1.
  template <class Loader>
  __device__ __forceinline__ void multiply(Loader& loader, const unsigned char* stages, int begin,
                                           int end) {
    int stage = 0;
#pragma unroll 1
    for (int slice = begin; slice < end; ++slice) {
      ptx::cp_async_wait<Tile::kStages - 2>();
      __syncthreads();
      // The stage before this one is free: all warps have passed the barrier after reading it.
      const int free_stage = stage == 0 ? Tile::kStages - 1 : stage - 1;
      loader.start(free_stage);
      const int k0 = slice * Tile::kSliceK + place_.warp_k * Tile::kWarpK;
      if (k0 < static_cast<int>(product_.k)) multiply_slice(stages + stage * Tile::kStageBytes);
      loader.finish(free_stage);
      stage = stage == Tile::kStages - 1 ? 0 : stage + 1;
    }
  }

  __device__ __forceinline__ void store_sums(Sum* sums) const {
    store_warp_sums<Tile>(sums, sums_.all, place_);
  }

 private:
  static constexpr int kChunks = Tile::kWarpK / kSparse24ChunkK;

  __device__ __forceinline__ void multiply_slice(const unsigned char* stage) {
    uint32_t e[kRowTiles][2];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) load_sparse24_metadata_16bit(e[r], stage, place_, r);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int part = grid_.terms_shift == 0 ? place_.warp_k : place_.warp_k * kChunks + chunk;
      const int term = part * Tile::kRows + place_.row + lane_index() / 4;
      uint32_t zeros[kRowTiles][2];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          zeros[r][half] =
              sparse24_zero_pair<T>(stage[Tile::kZeroOffset + term + r * 16 + half * 8]);
        }
      }
#pragma unroll
      for (int step = 2 * chunk; step < 2 * chunk + 2; ++step) {
        uint32_t a[kRowTiles][4];
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) load_values(a[r], stage, r, step, zeros[r]);
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          uint32_t b[4];
          load_sparse24_tokens(b, stage, place_, 8 * j, step);
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
            mma_sp_16bit<T>(sums_.group[r][j], a[r], b, e[r], step);
          }
        }
      }
      if (grid_.terms_shift != 0 || chunk == kChunks - 1) {
        sums_.add_scaled(reinterpret_cast<const float*>(stage + Tile::kScaleOffset) + term);
      }
    }
  }

  // The A operand of a step: of rows g and g + 8, byte t of two words.
  __device__ __forceinline__ void load_values(uint32_t (&a)[4], const unsigned char* stage, int r,
                                              int step, const uint32_t (&zeros)[2]) const {
    const uint32_t select = sparse24_byte_select<T>(lane_index() % 4);
    const int chunk = place_.warp_k * kChunks + step / 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = place_.row + r * 16 + half * 8 + lane_index() / 4;
      const auto words = *reinterpret_cast<const uint2*>(
          stage + (chunk * Tile::kValueChunkRows + row) * 16 + step % 2 * 8);
      a[half] = sparse24_centred_pair(words.x, select, zeros[half], T{});
      a[half + 2] = sparse24_centred_pair(words.y, select, zeros[half], T{});
    }
  }

  const Sparse24Product& product_;
  const Sparse24Grid& grid_;
  WarpPlace<Tile> place_;
  GroupSums<Tile> sums_;
};

}  // namespace pumice::cuda
