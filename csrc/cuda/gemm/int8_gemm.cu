// kernel: int8_gemm
//
// y = (scale·(q weightᵀ) + outliers)·weight_scale + bias on the int8 tensor cores.
//
// Each block is persistent and takes items by turns: tiles of y, or parts of K of them where there
// are fewer tiles than SMs (add_parts). Slices of 128 bytes of q and weight run through a ring of
// stages in shared memory (cp.async), across items: the next one's first slices arrive while this
// one's outliers are added and its y is stored. Warps read operands by ldmatrix, a k step ahead of
// the mma.sync that use them.
//
// Chunk c (16 bytes) of row r of a slice lies at place c ^ (r mod 8) of the row: the 8 rows that an
// ldmatrix reads at one chunk then lie in 8 different groups of banks.
//
// The sums become fp32 in place: · scale, then the outlier phase (int8_outliers.h) adds to the same
// registers, then the epilogue. Nothing is read back and nothing is launched in between.
//
// Floors on an H200 (1979 TOPS dense by wgmma, of which mma.sync reaches some 62 %; 4.3 TB/s), and
// expectations, which are estimates and not measurements (int8_plan_clocks; the quantization's
// launch, some 3 µs, comes on top). bf16 is at 700 TFLOPS, or the bytes of its weights.
//
//     M × N × K            tensor cores    bytes    mma.sync    expected    bf16
//     4096 × 4096 × 4096       69 µs       16 µs     112 µs      125 µs     196 µs
//     2048 × 8192 × 8192      139 µs       27 µs     224 µs      250 µs     393 µs
//      128 × 8192 × 8192        9 µs       16 µs      14 µs       25 µs      36 µs
//       64 × 8192 × 8192        4 µs       16 µs       7 µs       21 µs      33 µs
//
// A Hopper-native kernel takes its place by rows of its own in the tile table (int8_tiles.h).
#include "cuda/gemm/int8_gemm.h"

#include "cuda/gemm/int8_epilogue.h"
#include "cuda/gemm/int8_outliers.h"
#include "cuda/gemm/int8_slices.h"
#include "cuda/gemm/int8_tiles.h"
#include "cuda/gemm/unaligned.h"
#include "cuda/launch.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/mma.h"
#include "cuda/ptx/thread.h"
#include "cuda/quantize/int8_quantize.h"

namespace pumice::cuda {
namespace {

constexpr int kTicketBytes = 16;  // of shared memory, after the stages

// Adds up the parts of a tile, whose sums are integers: exactly, in any order. Every block leaves
// its sums in global memory and takes a ticket; the one with the last ticket has all others' to
// read, and goes on with the tile (true). Nobody waits.
template <class Tile>
__device__ __forceinline__ bool add_parts(int32_t (&sum)[Tile::kWarpM / 16][Tile::kWarpN / 8][4],
                                          const Int8Work& work, int item, uint32_t* shared_ticket,
                                          int thread) {
  constexpr int kFragmentsN = Tile::kWarpN / 8;
  constexpr int64_t kItemFragments = Tile::kBlockM * Tile::kBlockN / 4;
  int4* partial = reinterpret_cast<int4*>(work.partial_sums) + thread;
#pragma unroll
  for (int i = 0; i < Tile::kWarpM / 16; ++i) {
#pragma unroll
    for (int j = 0; j < kFragmentsN; ++j) {
      const int32_t (&s)[4] = sum[i][j];
      partial[item * kItemFragments + (i * kFragmentsN + j) * Tile::kThreads] = {s[0], s[1], s[2],
                                                                                 s[3]};
    }
  }
  __threadfence();
  __syncthreads();
  if (thread == 0) *shared_ticket = atomicAdd(work.tickets + item / work.parts, 1u);
  __syncthreads();
  if (*shared_ticket != static_cast<uint32_t>(work.parts - 1)) return false;
  __threadfence();
  const int first_item = item / work.parts * work.parts;
#pragma unroll 1
  for (int other = first_item; other < first_item + work.parts; ++other) {
    if (other == item) continue;
#pragma unroll
    for (int i = 0; i < Tile::kWarpM / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kFragmentsN; ++j) {
        const int4 s = partial[other * kItemFragments + (i * kFragmentsN + j) * Tile::kThreads];
        sum[i][j][0] += s.x;
        sum[i][j][1] += s.y;
        sum[i][j][2] += s.z;
        sum[i][j][3] += s.w;
      }
    }
  }
  return true;
}

template <class Tile>
__device__ __forceinline__ OutlierShared outlier_shared(DType x_dtype) {
  constexpr int kRowBytes = kOutlierStep * 2;
  constexpr int kStageBytes = (Tile::kBlockM + Tile::kBlockN) * kSliceBytes;
  unsigned char* memory =
      dynamic_shared_memory<unsigned char>() + Tile::kStages * kStageBytes + kTicketBytes;
  OutlierShared shared;
  shared.residual = memory;
  shared.weight = shared.residual + Tile::kBlockM * kRowBytes;
  shared.columns = reinterpret_cast<int32_t*>(shared.weight + Tile::kBlockN * kRowBytes);
  shared.list = reinterpret_cast<OutlierList*>(shared.columns + kOutlierListCapacity);
  shared.residual_low = reinterpret_cast<unsigned char*>(shared.list + 1);
  const int low_bytes = x_dtype == DType::kFloat32 ? Tile::kBlockM * kRowBytes : 0;
  shared.mask = reinterpret_cast<uint32_t*>(shared.residual_low + low_bytes);
  return shared;
}

template <class Tile, bool kAligned>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    int8_gemm_kernel(const __grid_constant__ Int8Product product,
                     const __grid_constant__ Int8Tokens tokens,
                     const __grid_constant__ Int8Outliers outliers,
                     const __grid_constant__ Int8Work work) {
  using Loader = Int8SliceLoader<Tile, kAligned>;
  constexpr int kFragmentsM = Tile::kWarpM / 16, kFragmentsN = Tile::kWarpN / 8;
  unsigned char* stages = dynamic_shared_memory<unsigned char>();
  const int warp_row = warp_index() / Tile::kWarpsN * Tile::kWarpM;
  const int warp_column = warp_index() % Tile::kWarpsN * Tile::kWarpN;
  const unsigned char* a_rows = stages + warp_row * kSliceBytes;
  const unsigned char* b_rows = stages + (Tile::kBlockM + warp_column) * kSliceBytes;

  Loader loader(product, tokens, work, stages);
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) loader.load_next(stage);

  uint32_t* shared_ticket =
      reinterpret_cast<uint32_t*>(stages + Tile::kStages * Loader::kStageBytes);
  if (outliers.x) {
    collect_outliers<Tile::kThreads>(outliers, outlier_shared<Tile>(product.y_dtype));
  }

  int stage = 0;
  for (int item = static_cast<int>(blockIdx.x); item < work.items();
       item += static_cast<int>(gridDim.x)) {
    int32_t sum[kFragmentsM][kFragmentsN][4] = {};
    // While one k step is multiplied, the operands of the next are read: A into a second set of
    // registers, B pair by pair into the same, as it is used up. Not across items: the registers
    // are for the epilogue then.
    uint32_t a[2][kFragmentsM][4], b[kFragmentsN][2];
    ptx::cp_async_wait<Tile::kStages - 2>();
    __syncthreads();
    load_a(a[0], a_rows + stage * Loader::kStageBytes, 0);
    load_b(b, b_rows + stage * Loader::kStageBytes, 0);
#pragma unroll 1
    for (int slice = work.slices_of(item); slice > 0; --slice) {
      // The stage before this one is free: all warps passed a barrier after reading it.
      loader.load_next(stage == 0 ? Tile::kStages - 1 : stage - 1);
#pragma unroll
      for (int step = 0; step < kStepsOfSlice; ++step) {
        const bool last_step = step == kStepsOfSlice - 1;
        if (last_step) {
          stage = stage == Tile::kStages - 1 ? 0 : stage + 1;
          if (slice > 1) {
            ptx::cp_async_wait<Tile::kStages - 2>();
            __syncthreads();
            load_a(a[0], a_rows + stage * Loader::kStageBytes, 0);
          }
        } else {
          load_a(a[(step + 1) % 2], a_rows + stage * Loader::kStageBytes, step + 1);
        }
#pragma unroll
        for (int j = 0; j < kFragmentsN; j += 2) {
#pragma unroll
          for (int i = 0; i < kFragmentsM; ++i) {
            ptx::mma_m16n8k32_s8(sum[i][j], a[step % 2][i], b[j]);
            ptx::mma_m16n8k32_s8(sum[i][j + 1], a[step % 2][i], b[j + 1]);
          }
          if (!last_step) {
            load_b_pair(b[j], b[j + 1], b_rows + stage * Loader::kStageBytes, j, step + 1);
          }
        }
        if (last_step && slice > 1) load_b(b, b_rows + stage * Loader::kStageBytes, 0);
      }
    }

    const int thread = ptx::thread_index_here();
    if (work.parts > 1 && !add_parts<Tile>(sum, work, item, shared_ticket, thread)) continue;
    int tile_m, tile_n;
    work.locate(item, tile_m, tile_n);
    const int64_t m0 = static_cast<int64_t>(tile_m) * Tile::kBlockM;
    const int64_t n0 = static_cast<int64_t>(tile_n) * Tile::kBlockN;
    const int lane = thread % kWarpSize, warp = thread / kWarpSize;
    const int out_row = warp / Tile::kWarpsN * Tile::kWarpM;
    const int out_column = warp % Tile::kWarpsN * Tile::kWarpN;
    float out[kFragmentsM][kFragmentsN][4];
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t m = m0 + out_row + i * 16 + half * 8 + lane / 4;
        const float scale = m < product.m ? tokens.scale[m * tokens.scale_stride] : 0.0f;
#pragma unroll
        for (int j = 0; j < kFragmentsN; ++j) {
#pragma unroll
          for (int c = 2 * half; c < 2 * half + 2; ++c) {
            out[i][j][c] = static_cast<float>(sum[i][j][c]) * scale;
          }
        }
      }
    }
    const auto finish = [&](auto element) {
      using T = decltype(element);
      if (outliers.x) {
        add_outliers<T, Tile>(out, product, tokens, outliers, outlier_shared<Tile>(product.y_dtype),
                              m0, n0, thread, out_row, out_column);
      }
      store_tile<T>(out, product, m0 + out_row, n0 + out_column, lane);
    };
    switch (product.y_dtype) {
      case DType::kFloat32:
        finish(float{});
        break;
      case DType::kFloat16:
        finish(__half{});
        break;
      case DType::kBFloat16:
        finish(__nv_bfloat16{});
        break;
    }
  }
}

struct GemmLaunch {
  Int8Product product;
  Int8Tokens tokens;
  Int8Outliers outliers;
  Int8Work work;
  int blocks;
  size_t shared_bytes;
  cudaStream_t stream;

  template <class Tile, bool kAligned>
  void run() const {
    launch(int8_gemm_kernel<Tile, kAligned>, dim3(blocks), dim3(Tile::kThreads), shared_bytes,
           stream, product, tokens, outliers, work);
  }
};

Int8GemmShape shape_of(const Int8Product& product, bool outliers) {
  return {product.m, product.n, product.k, outliers ? mask_words(product.k) : 0, product.y_dtype};
}

}  // namespace

Int8GemmSetup plan_int8_gemm(const Int8Product& product, const int8_t* q, int64_t q_stride,
                             bool outliers, const Int8Device& device) {
  const Int8GemmShape shape = shape_of(product, outliers);
  const bool aligned =
      rows_are_aligned_16(q, q_stride) && rows_are_aligned_16(product.weight, product.k);
  // Rows that are not aligned come a byte at a time, which is slow with any tile: one will do.
  const Int8Plan plan = aligned
                            ? choose_int8_plan(shape, device.sm_count, device.shared_memory_limit)
                            : Int8Plan{kInt8Tiles[0], 1};
  return {plan, aligned, int8_partial_bytes(plan, shape), int8_ticket_count(plan, shape)};
}

void int8_gemm(const Int8Product& product, const Int8Tokens& tokens, const Int8Outliers& outliers,
               const Int8GemmSetup& setup, int32_t* partial_sums, uint32_t* tickets,
               const Int8Device& device, cudaStream_t stream) {
  const Int8TileRow& tile = setup.plan.tile;
  const Int8GemmShape shape = shape_of(product, outliers.x != nullptr);
  const int64_t items = int8_tile_count(tile, shape) * setup.plan.parts;
  STD_TORCH_CHECK(items <= INT32_MAX / 2, "pumice: an int8 product of ", product.m, " × ",
                  product.n, " outputs is too large for one launch");
  const Int8Work work = {static_cast<int>(tiles_along(product.m, tile.block_m)),
                         static_cast<int>(tiles_along(product.n, tile.block_n)),
                         setup.plan.parts,
                         static_cast<int>(slices_of(product.k)),
                         partial_sums,
                         tickets};
  const GemmLaunch gemm = {
      product,
      tokens,
      outliers,
      work,
      int8_gemm_blocks(setup.plan, shape, device.sm_count, device.shared_memory_limit),
      int8_shared_bytes(tile, shape),
      stream};
  if (!setup.aligned) return gemm.run<Tile64x64Shallow, false>();
  switch (tile.name) {
    case Int8TileName::k64x64Shallow:
      return gemm.run<Tile64x64Shallow, true>();
    case Int8TileName::k64x64:
      return gemm.run<Tile64x64, true>();
    case Int8TileName::k128x64:
      return gemm.run<Tile128x64, true>();
    case Int8TileName::k128x128:
      return gemm.run<Tile128x128, true>();
    case Int8TileName::k128x256:
      return gemm.run<Tile128x256, true>();
    case Int8TileName::k128x256Shallow:
      return gemm.run<Tile128x256Shallow, true>();
  }
}

}  // namespace pumice::cuda
