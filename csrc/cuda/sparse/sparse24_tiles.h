// Which tile of the 2:4 products multiplies a shape, and in how many parts of K. Pure functions of
// numbers, tested on the host (tests/cuda/). The choices rest on counted bytes and instructions: no
// GPU was at hand to tune them.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"
#include "cuda/gemm/tile_plan.h"

namespace pumice::cuda {

// What a warp takes of an operand in a slice of K: four mma.sp.
constexpr int kSparse24Steps = 4;
constexpr int kSparse24TokenBytes = 64 * kSparse24Steps;  // of a token

enum class Sparse24Kind { k16Bit, kInt8, kInt4 };

template <Sparse24Kind kKind>
struct Sparse24Format;
template <>
struct Sparse24Format<Sparse24Kind::k16Bit> {
  static constexpr int kStepK = 32;        // columns of an mma.sp
  static constexpr int kValueBytes = 128;  // of a row: half of the columns are kept
  static constexpr int kMetaBytes = 16;
};
template <>
struct Sparse24Format<Sparse24Kind::kInt8> {
  static constexpr int kStepK = 64;
  static constexpr int kValueBytes = 128;
  static constexpr int kMetaBytes = 32;
};
template <>
struct Sparse24Format<Sparse24Kind::kInt4> {  // multiplied in 16 bit
  static constexpr int kStepK = 32;
  static constexpr int kValueBytes = 32;
  static constexpr int kMetaBytes = 16;
};

// A stage of shared memory takes what lies 16 bytes (a chunk) after another in global memory, 8
// lanes at once, and gives 8 rows at once: each 8 must be in 8 different groups of 4 banks.
//
// [row][chunk], of rows of a multiple of 8 chunks: where chunk c lies in its row.
PUMICE_HOST_DEVICE int sparse24_chunk_place(int row, int c) { return c ^ (row & 7); }
// [chunk][row]: rows of how many there is room for in each chunk. Neighbouring lanes write the 2, 4
// or 8 chunks of a row, which therefore begin 4, 2 or 1 groups of banks apart.
PUMICE_HOST_DEVICE constexpr int sparse24_rows_of_chunk(int rows, int chunks) {
  return rows + 8 / chunks;
}

// Columns that share a scale of int4 weights are a multiple of this, or all: two mma.sp.
constexpr int kSparse24ChunkK = 64;
// Chunks are counted in 16 bits; longer rows are written out in 16 bits first.
constexpr int64_t kSparse24MaxInt4K = int64_t{kSparse24ChunkK} << 15;

// One block's tile of y, seen as [rows of the weight][tokens], how its warps cut it, and along K.
template <Sparse24Kind kOfKind, int kTileRows, int kTileTokens, int kWarpsAlongRows,
          int kWarpsAlongTokens, int kWarpsAlongK, int kPipeline, int kResident>
struct Sparse24Tile {
  static constexpr Sparse24Kind kKind = kOfKind;
  using Format = Sparse24Format<kKind>;
  static constexpr int kRows = kTileRows;
  static constexpr int kTokens = kTileTokens;
  static constexpr int kWarpsRows = kWarpsAlongRows;
  static constexpr int kWarpsTokens = kWarpsAlongTokens;
  static constexpr int kWarpsK = kWarpsAlongK;
  static constexpr int kThreads = 32 * kWarpsRows * kWarpsTokens * kWarpsK;
  static constexpr int kStages = kPipeline;
  static constexpr int kBlocksPerSm = kResident;

  static constexpr int kWarpK = Format::kStepK * kSparse24Steps;
  static constexpr int kSliceK = kWarpK * kWarpsK;
  static constexpr int kWarpRows = kRows / kWarpsRows;
  static constexpr int kWarpTokens = kTokens / kWarpsTokens;
  static constexpr int kRowTiles = kWarpRows / 16;
  static constexpr int kTokenTiles = kWarpTokens / 8;

  // A stage of the ring: values, metadata, x; for int4 scales (fp32) and zero points (bytes).
  static constexpr int kValueRowBytes = kWarpsK * Format::kValueBytes;
  static constexpr int kMetaRowBytes = kWarpsK * Format::kMetaBytes;
  static constexpr int kTokenRowBytes = kWarpsK * kSparse24TokenBytes;
  static constexpr int kValueChunks = kValueRowBytes / 16;  // of 16 bytes
  static constexpr int kMetaChunks = kMetaRowBytes / 16;
  static constexpr int kTerms =
      kKind == Sparse24Kind::kInt4 ? kRows * kSliceK / kSparse24ChunkK : 0;
  static constexpr int kValueChunkRows = sparse24_rows_of_chunk(kRows, kValueChunks);  // int4
  static constexpr int kMetaChunkRows = sparse24_rows_of_chunk(kRows, kMetaChunks);
  static constexpr int kMetaOffset =
      kKind == Sparse24Kind::kInt4 ? kValueChunks * kValueChunkRows * 16 : kRows * kValueRowBytes;
  static constexpr int kTokenOffset = kMetaOffset + kMetaChunks * kMetaChunkRows * 16;
  static constexpr int kScaleOffset = kTokenOffset + kTokens * kTokenRowBytes;
  static constexpr int kZeroOffset = kScaleOffset + 4 * kTerms;
  static constexpr int kStageBytes = kZeroOffset + kTerms;

  // The sums of a tile take the place of the stages: [warp of K][token][row], 4 words of padding so
  // that the 4 token pairs and 8 rows that a warp stores at once lie in different banks.
  static constexpr int kSumStride = kRows + 4;
  static constexpr int kSumBytes = kWarpsK * kTokens * kSumStride * 4;
  static constexpr int kTailOffset = std::max(kStages * kStageBytes, kSumBytes);
  static constexpr size_t kSharedBytes = kTailOffset + 16;

  static_assert(kWarpRows % 16 == 0 && kWarpTokens % 8 == 0 && kStages >= 2);
};

// What a tile's slice of K takes on an SM of an H200, in clocks, counted in the machine code for
// sm_90a: arriving from memory at 20.7 bytes a clock (4.8 TB/s; an H100 has 14.5); its
// instructions, four a clock; shared memory at 128 bytes a clock, copies in and fragments out;
// mma.sp, at the full rate one a clock. Up to 64 tokens what is allowed is a part of the bandwidth
// (H200, H100), beyond of the tensor cores' rate.
//
//            memory  issue  shared  mma.sp  allowed
//   16 bit  k8  890    145     400      32  100 %, 100 %
//          k32  890    217     688     128  100 %, 100 %
//          k64  890    253     944     256   94 %, 100 %
//         k128         494    1552     512   33 %
//         k256         690    2208    1024   46 %
//   int8    k8  989    175     448      32  100 %, 100 %
//          k32  989    247     736     128  100 %, 100 %
//          k64  989    280     992     256  100 %, 100 %
//         k128         478    1696     512   30 %
//         k256         880    2368    1024   43 %
//   int4    k8  594    660     608      64   90 %, 100 %  (fp16; bf16 82 %, 100 %)
//          k16  594    750     800     128   74 %, 100 %
//          k32  594    906    1184     256   50 %, 72 %
//          k64  297    706    1008     256   29 %, 42 %
//         k128         998    1648     512   31 %
//
// Values of 16 and of 8 bits: two row tiles a warp, for the fragments of x to be read half as
// often; two warps along K make a slice of 256 bytes of each row.
//
// 90 KB. Weights under way on an SM: 2 blocks · 3 stages · 18 KB; Little's law asks for 26 KB.
template <Sparse24Kind kKind>
using Sparse24Tile8 = Sparse24Tile<kKind, 64, 8, 2, 1, 2, 4, 2>;
template <Sparse24Kind kKind>
using Sparse24Tile32 = Sparse24Tile<kKind, 64, 32, 2, 1, 2, 3, 2>;  // 104 KB
// 70 KB, for every GPU from sm_80 on. Two blocks, 37 KB of weights under way.
template <Sparse24Kind kKind>
using Sparse24Tile64 = Sparse24Tile<kKind, 128, 64, 4, 1, 1, 2, 2>;
// For large M shared memory is the limit. A token's fragment is twice as large as a row's: warps of
// 64 rows × 64 tokens take 48 clocks of it for 32 mma.sp, 64 × 32 take 64, and the copies 17 more.
//
// 154 KB, which an A100 has, too.
template <Sparse24Kind kKind>
using Sparse24Tile128 = Sparse24Tile<kKind, 128, 128, 2, 4, 1, 3, 1>;
// 139 KB. Two stages will do: a slice keeps a Hopper's tensor cores busy for 1650 clocks.
template <Sparse24Kind kKind>
using Sparse24Tile256 = Sparse24Tile<kKind, 256, 128, 4, 2, 1, 2, 1>;

// int4. Widening takes the issue slots: no two warps widen the same weights up to 32 tokens.
using Sparse24Int4Tile8 = Sparse24Tile<Sparse24Kind::kInt4, 64, 8, 2, 1, 4, 3, 2>;       // 68 KB
using Sparse24Int4Tile16 = Sparse24Tile<Sparse24Kind::kInt4, 64, 16, 2, 1, 4, 3, 2>;     // 93 KB
using Sparse24Int4Tile32 = Sparse24Tile<Sparse24Kind::kInt4, 64, 32, 2, 1, 4, 3, 1>;     // 143 KB
using Sparse24Int4Tile64 = Sparse24Tile<Sparse24Kind::kInt4, 128, 64, 4, 2, 1, 3, 1>;    // 72 KB
using Sparse24Int4Tile128 = Sparse24Tile<Sparse24Kind::kInt4, 128, 128, 4, 2, 1, 3, 1>;  // 121 KB

enum class Sparse24TileName { k8, k16, k32, k64, k128, k256 };

struct Sparse24TileRow {
  Sparse24TileName name;
  int max_tokens;  // that it is made for
  int rows, tokens, slice_k;
  size_t shared_bytes;
  double rate;  // of the best tile's multiplications
};

template <class Tile>
constexpr Sparse24TileRow describe_sparse24(Sparse24TileName name, int max_tokens, double rate) {
  return {name, max_tokens, Tile::kRows, Tile::kTokens, Tile::kSliceK, Tile::kSharedBytes, rate};
}

// Without a bound on the tokens.
constexpr int kAnyTokens = 1 << 30;

template <Sparse24Kind kKind>
constexpr auto kSparse24Tiles =
    std::array{describe_sparse24<Sparse24Tile8<kKind>>(Sparse24TileName::k8, 8, 0.1),
               describe_sparse24<Sparse24Tile32<kKind>>(Sparse24TileName::k32, 32, 0.3),
               describe_sparse24<Sparse24Tile64<kKind>>(Sparse24TileName::k64, 64, 0.6),
               describe_sparse24<Sparse24Tile128<kKind>>(Sparse24TileName::k128, kAnyTokens, 0.72),
               describe_sparse24<Sparse24Tile256<kKind>>(Sparse24TileName::k256, kAnyTokens, 1.0)};
template <>
constexpr auto kSparse24Tiles<Sparse24Kind::kInt4> =
    std::array{describe_sparse24<Sparse24Int4Tile8>(Sparse24TileName::k8, 8, 0.1),
               describe_sparse24<Sparse24Int4Tile16>(Sparse24TileName::k16, 16, 0.2),
               describe_sparse24<Sparse24Int4Tile32>(Sparse24TileName::k32, 32, 0.3),
               describe_sparse24<Sparse24Int4Tile64>(Sparse24TileName::k64, 64, 0.6),
               describe_sparse24<Sparse24Int4Tile128>(Sparse24TileName::k128, kAnyTokens, 1.0)};

struct Sparse24Plan : TilePlan {
  Sparse24TileName tile;
};

constexpr Sparse24Plan sparse24_plan_of(const Sparse24TileRow& row) {
  return {{row.rows, row.tokens, row.slice_k, 1}, row.name};
}

// Rounds of blocks, as they take turns on the SMs, times what one takes.
constexpr double sparse24_cost(const Sparse24TileRow& row, int64_t m, int64_t n, int sm_count) {
  const int64_t tiles = tile_count(sparse24_plan_of(row), m, n);
  const auto rounds = static_cast<double>((tiles + sm_count - 1) / sm_count);
  return rounds * row.rows * row.tokens / row.rate;
}

// Of the tiles that fit the device: the first that is made for so few tokens, else the cheapest of
// those without a bound; on devices that lack these k64. Operands whose rows are not aligned come
// through registers, in two shapes only.
template <Sparse24Kind kKind>
constexpr Sparse24Plan choose_sparse24_tile(int64_t m, int64_t n, bool aligned, int sm_count,
                                            size_t shared_memory_limit) {
  constexpr auto& tiles = kSparse24Tiles<kKind>;
  const auto named = [&](Sparse24TileName name) {
    for (const Sparse24TileRow& row : tiles) {
      if (row.name == name) return sparse24_plan_of(row);
    }
    return Sparse24Plan{};
  };
  if (!aligned) return named(m <= 8 ? Sparse24TileName::k8 : Sparse24TileName::k64);
  const Sparse24TileRow* best = nullptr;
  for (const Sparse24TileRow& row : tiles) {
    if (row.shared_bytes > shared_memory_limit) continue;
    if (row.max_tokens != kAnyTokens) {
      if (m <= row.max_tokens) return sparse24_plan_of(row);
    } else if (best == nullptr ||
               sparse24_cost(row, m, n, sm_count) < sparse24_cost(*best, m, n, sm_count)) {
      best = &row;
    }
  }
  return best ? sparse24_plan_of(*best) : named(Sparse24TileName::k64);
}

// The tile, and the parts of K.
template <Sparse24Kind kKind>
constexpr Sparse24Plan plan_sparse24(int64_t m, int64_t n, int64_t k, bool aligned, int sm_count,
                                     size_t shared_memory_limit) {
  Sparse24Plan plan = choose_sparse24_tile<kKind>(m, n, aligned, sm_count, shared_memory_limit);
  plan.parts = parts_of_k(plan, m, n, k, sm_count);
  return plan;
}

// From this many tokens on the kept int4 weights are written out in 16 bits for the call and
// multiplied as such: 1.25 bytes of traffic for each place of W, 23 µs for 8192 × 8192, which at
// 512 tokens is a quarter of the product's time, where widening in the kernel takes half of its
// issue slots. A projection until a GPU has measured it.
constexpr int64_t kSparse24DequantizeFrom = 512;

// From this many tokens on the weight is written out dense for the call and multiplied by torch's
// own product (sparse24_dense.cu).
//
// fp32: decompression moves 6.1 bytes for each place of W, some 140 µs for 8192 × 8192 on an H200.
// There a dense product takes 2.5 µs for each token at 80 % of 67 TFLOPS, and sparse24_fp32 5.1:
// equal at 54 tokens. A projection, rounded up to a power of two.
//
// fp16, bf16: never, until a GPU has measured it. For 8192 × 8192 the decompression, 23 bytes for 8
// places, takes 54 µs, and each token 0.19 µs at the 700 TFLOPS of cuBLAS; sparse24_gemm takes 0.16
// at the 830 expected of it, but 0.38 at the 350 that others measured with mma.sp
// (sparse24_gemm_fp16.cu): then this number should be 300. PUMICE_SPARSE24_DENSE_FROM sets it for a
// process, for that measurement.
constexpr int64_t kSparse24NeverDense = INT64_MAX;
constexpr int64_t sparse24_dense_from(DType dtype, int /*compute_capability*/) {
  return dtype == DType::kFloat32 ? 64 : kSparse24NeverDense;
}

}  // namespace pumice::cuda
