// Launching the int8 quantization kernels. Host code; nothing here needs a GPU.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "common/int8_numerics.h"
#include "cuda/device.h"

namespace pumice::cuda {

// Where the rows come from and go to. x' = x · smooth, an outlier is an x' with !(|x'| <
// threshold).
struct Int8Rows {
  const void* x;  // [m, k]
  DType dtype;
  int64_t m, k;
  const float* smooth;   // [k] or null
  float threshold;       // infinity where no threshold was given: then non-finite values
  bool outliers_wanted;  // else a non-finite value makes the scale NaN
  int8_t* q;             // [m, q_stride], columns from k on zeroed
  int64_t q_stride;
  // Bit k % 32 of word k / 32 of mask b: block b has met an outlier in column k. Masks of
  // mask_words(k) words, one for each block; null where no outliers are wanted.
  uint32_t* partial_masks;
  // Words to set to zero on the way, for the launch that comes after (int8_quantize_rows only).
  uint32_t* zeros;
  int64_t zero_count;
};

// A mask is read 16 bytes at a time.
PUMICE_HOST_DEVICE constexpr int64_t mask_words(int64_t k) { return (k + 127) / 128 * 4; }

// Two rows in a block at a time, each by a team of 256 threads: with one block on an SM there are
// only as many partial masks as SMs, for the product's blocks all read all of them, and still one
// row's barrier hides behind the other's arithmetic.
constexpr int kTeams = 2;
constexpr int kTeamThreads = 256;
constexpr int kRowStages = 3;  // rows under way for each team

// How many blocks quantize m rows: one for each SM, or fewer, such that all have the same number of
// rows up to one. Also the number of partial masks.
constexpr int int8_rows_blocks(int64_t m, int sm_count) {
  const int64_t pairs = (m + kTeams - 1) / kTeams;
  const int64_t steps = (pairs + sm_count - 1) / sm_count;
  return static_cast<int>((pairs + steps - 1) / steps);
}

// One scale for each row: scale[m] and, where the pointer is not null, inverse_scale[m] = 1/scale
// as it was used.
void int8_quantize_rows(const Int8Rows& rows, float* scale, float* inverse_scale, int blocks,
                        size_t shared_memory_limit, cudaStream_t stream);

// One scale for the tensor. absmax_bits holds one word for each block.
void int8_quantize_tensor(const Int8Rows& rows, float* scale, uint32_t* absmax_bits, int blocks,
                          cudaStream_t stream);

// With the given scale, clamped; copies it to scale.
void int8_quantize_static(const Int8Rows& rows, const float* given_scale, float* scale, int blocks,
                          cudaStream_t stream);

// outliers[k] = some partial mask has bit k.
void collect_outlier_columns(const uint32_t* partial_masks, int masks, int64_t k, bool* outliers,
                             cudaStream_t stream);

}  // namespace pumice::cuda
