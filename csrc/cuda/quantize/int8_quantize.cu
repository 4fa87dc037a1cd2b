// kernel: int8_quantize
//
// q = rint(x · 127/absmax), with the columns that hold outliers found on the way.
//
// Per token: one pass over memory. A block keeps kRowStages rows a team under way in shared memory
// (cp.async, every thread copying just what it will read, so that only the row's maximum needs a
// barrier); rows that are not 16-byte aligned or too long for that are read twice, the second time
// from L2. Outliers go into a mask in shared memory that leaves once, when the block is done: no
// atomics, nothing to zero before, and the same result in any order.
//
// Floor: M·K·(bytes of x + 1) + 4·M bytes. bf16, 4096 × 4096: 50 MB, 11.7 µs at 4.3 TB/s. Expected
// 75-85 % of that rate: by Little's law 4.3 TB/s · 0.8 µs = 26 KB an SM must be under way, here 2
// teams · 2 rows · 8 KB = 32 KB, and some 12 instructions an element take 60 % of the issue slots.
//
// Per tensor: two passes and two launches, the second one reading every block's maximum.
// Static: one pass, one launch.
#include "cuda/quantize/int8_quantize.h"

#include "cuda/element.h"
#include "cuda/launch.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/quantize/int8_groups.h"

namespace pumice::cuda {
namespace {

constexpr int kTeamWarps = kTeamThreads / kWarpSize;
constexpr int kBlockWarps = kTeams * kTeamWarps;
constexpr int kTensorThreads = 256;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ __forceinline__ uint32_t warp_max(uint32_t value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = max(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  return value;
}

// The largest of `count` words that other threads wrote before a barrier.
__device__ __forceinline__ uint32_t max_of(const uint32_t* words, int count) {
  uint32_t largest = 0;
  for (int i = 0; i < count; ++i) largest = max(largest, words[i]);
  return largest;
}

struct Scale {
  float scale, inverse;
};

__device__ __forceinline__ Scale scale_of(uint32_t absmax_bits) {
  if (absmax_bits >= kInfinityBits) return {__uint_as_float(kNaNBits), 0.0f};
  const float absmax = __uint_as_float(absmax_bits);
  return {int8_scale(absmax), int8_inverse_scale(absmax)};
}

// Adds a group's outliers to its byte of the mask; without a mask they make the row not a number.
// `count` columns of the group exist (a threshold that rounds to 0 makes outliers of the padding).
__device__ __forceinline__ uint32_t record(const GroupStatistics& found, uint8_t* mask_byte,
                                           int64_t count) {
  if (found.outliers == 0) return found.absmax_bits;
  if (mask_byte == nullptr) return kNaNBits;
  const uint32_t existing = count >= kGroup ? 0xff : count > 0 ? (1u << count) - 1 : 0;
  *mask_byte |= static_cast<uint8_t>(found.outliers & existing);
  return found.absmax_bits;
}

// Shared memory of int8_quantize_rows_kernel, in this order.
struct RowsLayout {
  int64_t row_bytes;   // one staged row, 0 where rows are not staged
  int64_t mask_bytes;  // one team's mask, 0 where none is wanted
  __host__ __device__ size_t masks() const { return 2 * kBlockWarps * sizeof(uint32_t); }
  __host__ __device__ size_t rows() const { return masks() + kTeams * mask_bytes; }
  __host__ __device__ size_t total() const { return rows() + kTeams * kRowStages * row_bytes; }
};

template <class T, bool kStaged>
__global__ void __launch_bounds__(kTeams* kTeamThreads, 1)
    int8_quantize_rows_kernel(Int8Rows rows, RowsLayout layout, float* scales,
                              float* inverse_scales) {
  unsigned char* shared = dynamic_shared_memory<unsigned char>();
  const int team = static_cast<int>(threadIdx.x) / kTeamThreads;
  const int thread = static_cast<int>(threadIdx.x) % kTeamThreads;
  uint32_t* warp_maxima = reinterpret_cast<uint32_t*>(shared);  // [2][kBlockWarps]
  uint8_t* masks = shared + layout.masks();                     // [kTeams][mask_bytes]
  uint8_t* mask = masks + team * layout.mask_bytes;
  unsigned char* ring = shared + layout.rows() + team * kRowStages * layout.row_bytes;

  const int64_t k = rows.k;
  const int64_t groups = ceil_div(rows.q_stride, kGroup);
  const int64_t row_step = static_cast<int64_t>(gridDim.x) * kTeams;
  const T* x = static_cast<const T*>(rows.x);
  int64_t row = static_cast<int64_t>(blockIdx.x) * kTeams + team;

  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < rows.zero_count;
       i += int64_t{gridDim.x} * blockDim.x) {
    rows.zeros[i] = 0;
  }
  if (rows.outliers_wanted) {
    for (int64_t i = threadIdx.x; i < kTeams * layout.mask_bytes; i += kTeams * kTeamThreads) {
      masks[i] = 0;
    }
    __syncthreads();
  }

  const auto stage_row = [&](int64_t ahead, int stage) {
    if (ahead < rows.m) {
      constexpr int kVectors = kGroup * sizeof(T) / 16;  // of a group
      const int64_t bytes = k * static_cast<int64_t>(sizeof(T));
      const unsigned char* source = reinterpret_cast<const unsigned char*>(x + ahead * k);
      unsigned char* target = ring + stage * layout.row_bytes;
      for (int64_t group = thread; group < groups; group += kTeamThreads) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const int64_t at = (group * kVectors + v) * 16;
          const bool valid = at < bytes;  // beyond the row: zeros
          ptx::cp_async_16(target + at, source + (valid ? at : 0), valid);
        }
      }
    }
    ptx::cp_async_commit();
  };
  if constexpr (kStaged) {
    for (int stage = 0; stage < kRowStages - 1; ++stage) stage_row(row + stage * row_step, stage);
  }

  const auto load = [&](float (&v)[kGroup], int64_t group, int stage) {
    const int64_t column = group * kGroup;
    if constexpr (kStaged) {
      load_whole_group(v, reinterpret_cast<const T*>(ring + stage * layout.row_bytes) + column);
    } else {
      load_group(v, x + row * k + column, k - column);
    }
    if (rows.smooth) apply_smooth(v, rows.smooth + column, k - column);
  };

  // Both teams take the same number of steps: they share the barrier.
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTeams;
  int stage = 0, parity = 0;
  for (int64_t step_row = first_row; step_row < rows.m; step_row += row_step) {
    if constexpr (kStaged) {
      const int free_stage = stage == 0 ? kRowStages - 1 : stage - 1;
      stage_row(row + (kRowStages - 1) * row_step, free_stage);
      ptx::cp_async_wait<kRowStages - 1>();
    }
    const bool active = row < rows.m;
    uint32_t absmax_bits = 0;
    if (active) {
      for (int64_t group = thread; group < groups; group += kTeamThreads) {
        float v[kGroup];
        load(v, group, stage);
        // Beyond the columns, in the padding of q, there is nothing to find.
        uint8_t* mask_byte = rows.outliers_wanted ? mask + group : nullptr;
        absmax_bits =
            max(absmax_bits, record(examine(v, rows.threshold), mask_byte, k - group * kGroup));
      }
    }
    // Two sets of maxima by turns: when one is written again, a barrier has passed since its
    // reading.
    absmax_bits = warp_max(absmax_bits);
    uint32_t* maxima = warp_maxima + parity * kBlockWarps;
    if (lane_index() == 0) maxima[warp_index()] = absmax_bits;
    __syncthreads();
    if (active) {
      const Scale scale = scale_of(max_of(maxima + team * kTeamWarps, kTeamWarps));
      int8_t* q = rows.q + row * rows.q_stride;
      for (int64_t group = thread; group < groups; group += kTeamThreads) {
        float v[kGroup];
        load(v, group, stage);
        store_group(q + group * kGroup, round_group(v, scale.inverse, rows.threshold),
                    rows.q_stride - group * kGroup);
      }
      if (thread == 0) {
        scales[row] = scale.scale;
        if (inverse_scales) inverse_scales[row] = scale.inverse;
      }
    }
    row += row_step;
    stage = stage == kRowStages - 1 ? 0 : stage + 1;
    parity ^= 1;
  }

  if (!rows.outliers_wanted) return;
  __syncthreads();
  const uint32_t* team_masks = reinterpret_cast<const uint32_t*>(masks);
  const int64_t words = layout.mask_bytes / 4;
  uint32_t* partial = rows.partial_masks + blockIdx.x * words;
  for (int64_t word = threadIdx.x; word < words; word += kTeams * kTeamThreads) {
    partial[word] = team_masks[word] | team_masks[words + word];
  }
}

// The block's share of the tensor's absolute maximum, and its mask.
template <class T>
__global__ void __launch_bounds__(kTensorThreads)
    int8_quantize_absmax_kernel(Int8Rows rows, uint32_t* block_absmax_bits) {
  uint32_t* warp_maxima = dynamic_shared_memory<uint32_t>();
  uint8_t* mask = reinterpret_cast<uint8_t*>(warp_maxima + kTensorThreads / kWarpSize);
  const int64_t words = mask_words(rows.k);
  const int64_t groups = ceil_div(rows.k, kGroup);
  if (rows.outliers_wanted) {
    for (int64_t i = threadIdx.x; i < words * 4; i += kTensorThreads) mask[i] = 0;
    __syncthreads();
  }
  uint32_t absmax_bits = 0;
  for (int64_t row = blockIdx.x; row < rows.m; row += gridDim.x) {
    const T* x = static_cast<const T*>(rows.x) + row * rows.k;
    for (int64_t group = threadIdx.x; group < groups; group += kTensorThreads) {
      const int64_t column = group * kGroup;
      float v[kGroup];
      load_group(v, x + column, rows.k - column);
      if (rows.smooth) apply_smooth(v, rows.smooth + column, rows.k - column);
      uint8_t* mask_byte = rows.outliers_wanted ? mask + group : nullptr;
      absmax_bits =
          max(absmax_bits, record(examine(v, rows.threshold), mask_byte, rows.k - column));
    }
  }
  absmax_bits = warp_max(absmax_bits);
  if (lane_index() == 0) warp_maxima[warp_index()] = absmax_bits;
  __syncthreads();
  if (threadIdx.x == 0) {
    block_absmax_bits[blockIdx.x] = max_of(warp_maxima, kTensorThreads / kWarpSize);
  }
  if (!rows.outliers_wanted) return;
  for (int64_t word = threadIdx.x; word < words; word += kTensorThreads) {
    rows.partial_masks[blockIdx.x * words + word] = reinterpret_cast<const uint32_t*>(mask)[word];
  }
}

// Rounds with one scale: the given one, or the one of the maxima of all blocks of the launch
// before.
template <class T>
__global__ void __launch_bounds__(kTensorThreads)
    int8_quantize_round_kernel(Int8Rows rows, const uint32_t* absmax_bits, int absmax_count,
                               const float* given_scale, float* scale_out) {
  Scale scale;
  if (given_scale) {
    scale = {*given_scale, 1.0f / *given_scale};
  } else {
    uint32_t* warp_maxima = dynamic_shared_memory<uint32_t>();
    uint32_t largest = 0;
    for (int i = threadIdx.x; i < absmax_count; i += kTensorThreads) {
      largest = max(largest, absmax_bits[i]);
    }
    largest = warp_max(largest);
    if (lane_index() == 0) warp_maxima[warp_index()] = largest;
    __syncthreads();
    scale = scale_of(max_of(warp_maxima, kTensorThreads / kWarpSize));
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *scale_out = scale.scale;

  const int64_t groups = ceil_div(rows.k, kGroup);
  for (int64_t row = blockIdx.x; row < rows.m; row += gridDim.x) {
    const T* x = static_cast<const T*>(rows.x) + row * rows.k;
    int8_t* q = rows.q + row * rows.q_stride;
    for (int64_t group = threadIdx.x; group < groups; group += kTensorThreads) {
      const int64_t column = group * kGroup;
      float v[kGroup];
      load_group(v, x + column, rows.k - column);
      if (rows.smooth) apply_smooth(v, rows.smooth + column, rows.k - column);
      const uint2 word = given_scale ? clamp_group(v, scale.inverse)
                                     : round_group(v, scale.inverse, rows.threshold);
      store_group(q + column, word, rows.k - column);
    }
  }
}

// A block ORs 8 words of all masks: 32 slices of the masks, 8 neighbouring words (one sector) each.
constexpr int kCollectWords = 8;
constexpr int kCollectThreads = 32 * kCollectWords;

__global__ void __launch_bounds__(kCollectThreads)
    int8_quantize_collect_kernel(const uint32_t* partial_masks, int masks, int64_t k,
                                 bool* outliers) {
  uint32_t* slices = dynamic_shared_memory<uint32_t>();  // [32][kCollectWords]
  const int64_t words = mask_words(k);
  const int64_t word =
      static_cast<int64_t>(blockIdx.x) * kCollectWords + threadIdx.x % kCollectWords;
  uint32_t found = 0;
  if (word < words) {
    for (int mask = threadIdx.x / kCollectWords; mask < masks; mask += 32) {
      found |= partial_masks[mask * words + word];
    }
  }
  slices[threadIdx.x] = found;
  __syncthreads();
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kCollectThreads + threadIdx.x;
  if (column >= k) return;
  found = 0;
  for (int slice = 0; slice < 32; ++slice) {
    found |= slices[slice * kCollectWords + threadIdx.x / 32];
  }
  outliers[column] = (found >> (threadIdx.x % 32)) & 1;
}

template <class T>
void launch_rows(const Int8Rows& rows, float* scale, float* inverse_scale, int blocks,
                 size_t shared_memory_limit, cudaStream_t stream) {
  const int64_t row_bytes = ceil_div(rows.q_stride, kGroup) * kGroup * sizeof(T);
  const int64_t mask_bytes = rows.outliers_wanted ? mask_words(rows.k) * 4 : 0;
  const bool aligned =
      reinterpret_cast<uintptr_t>(rows.x) % 16 == 0 && rows.k * sizeof(T) % 16 == 0;
  const RowsLayout staged = {row_bytes, mask_bytes};
  const RowsLayout unstaged = {0, mask_bytes};
  const bool stage = aligned && staged.total() <= shared_memory_limit;
  const RowsLayout& layout = stage ? staged : unstaged;
  launch(stage ? int8_quantize_rows_kernel<T, true> : int8_quantize_rows_kernel<T, false>,
         dim3(blocks), dim3(kTeams * kTeamThreads), layout.total(), stream, rows, layout, scale,
         inverse_scale);
}

}  // namespace

void int8_quantize_rows(const Int8Rows& rows, float* scale, float* inverse_scale, int blocks,
                        size_t shared_memory_limit, cudaStream_t stream) {
  dispatch_element(rows.dtype, [&](auto element) {
    launch_rows<decltype(element)>(rows, scale, inverse_scale, blocks, shared_memory_limit, stream);
  });
}

void int8_quantize_tensor(const Int8Rows& rows, float* scale, uint32_t* absmax_bits, int blocks,
                          cudaStream_t stream) {
  const size_t maxima_bytes = kTensorThreads / kWarpSize * sizeof(uint32_t);
  const size_t mask_bytes = rows.outliers_wanted ? mask_words(rows.k) * 4 : 0;
  dispatch_element(rows.dtype, [&](auto element) {
    using T = decltype(element);
    launch(int8_quantize_absmax_kernel<T>, dim3(blocks), dim3(kTensorThreads),
           maxima_bytes + mask_bytes, stream, rows, absmax_bits);
    launch(int8_quantize_round_kernel<T>, dim3(blocks), dim3(kTensorThreads), maxima_bytes, stream,
           rows, static_cast<const uint32_t*>(absmax_bits), blocks,
           static_cast<const float*>(nullptr), scale);
  });
}

void int8_quantize_static(const Int8Rows& rows, const float* given_scale, float* scale, int blocks,
                          cudaStream_t stream) {
  dispatch_element(rows.dtype, [&](auto element) {
    launch(int8_quantize_round_kernel<decltype(element)>, dim3(blocks), dim3(kTensorThreads),
           size_t{0}, stream, rows, static_cast<const uint32_t*>(nullptr), 0, given_scale, scale);
  });
}

void collect_outlier_columns(const uint32_t* partial_masks, int masks, int64_t k, bool* outliers,
                             cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(mask_words(k), kCollectWords));
  launch(int8_quantize_collect_kernel, dim3(blocks), dim3(kCollectThreads),
         kCollectThreads * sizeof(uint32_t), stream, partial_masks, masks, k, outliers);
}

}  // namespace pumice::cuda
