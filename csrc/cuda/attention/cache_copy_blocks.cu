// kernel: cache_copy_blocks
//
// Blocks of a cache to others, in units of up to 16 bytes: a few blocks of threads for each pair,
// so that few pairs of large blocks are copied at the rate of memory too. Reads and writes a block
// once; expected 80 % of 4.0 TB/s where there is enough to copy, else a launch.
#include <algorithm>

#include "cuda/attention/paged_writes.h"
#include "cuda/launch.h"

namespace pumice::cuda {
namespace {

constexpr int kCopyThreads = 256;

template <class Unit>
__global__ void __launch_bounds__(kCopyThreads)
    cache_copy_blocks_kernel(const __grid_constant__ CacheCopy copy, int shares) {
  const int64_t pair = blockIdx.x / shares;
  const int64_t from = copy.pairs[2 * pair], to = copy.pairs[2 * pair + 1];
  if (from < 0 || from >= copy.blocks || to < 0 || to >= copy.blocks || from == to) return;
  auto* data = static_cast<unsigned char*>(copy.data);
  const unsigned char* source = data + from * copy.block_stride;
  unsigned char* destination = data + to * copy.block_stride;
  const int64_t row_units = copy.row_bytes / static_cast<int64_t>(sizeof(Unit));
  const int64_t units = row_units * copy.slots * copy.heads;
  const int64_t share = blockIdx.x % shares;
  for (int64_t i = share * kCopyThreads + threadIdx.x; i < units;
       i += static_cast<int64_t>(shares) * kCopyThreads) {
    int64_t at = i * static_cast<int64_t>(sizeof(Unit));
    if (copy.slots * copy.heads > 1) {
      const int64_t row = i / row_units;
      at = row / copy.heads * copy.slot_stride + row % copy.heads * copy.head_stride +
           i % row_units * static_cast<int64_t>(sizeof(Unit));
    }
    *reinterpret_cast<Unit*>(destination + at) = *reinterpret_cast<const Unit*>(source + at);
  }
}

template <class Unit>
void launch_copy(const CacheCopy& copy, int sm_count, cudaStream_t stream) {
  const int64_t units =
      copy.row_bytes / static_cast<int64_t>(sizeof(Unit)) * copy.slots * copy.heads;
  // As many as fill the device 8 times, none with less than a unit for each thread.
  const int64_t shares = std::clamp<int64_t>((int64_t{8} * sm_count + copy.count - 1) / copy.count,
                                             1, (units + kCopyThreads - 1) / kCopyThreads);
  STD_TORCH_CHECK(copy.count * shares <= INT32_MAX,
                  "pumice::cache_copy_blocks: too many pairs for one launch, ", copy.count);
  launch(cache_copy_blocks_kernel<Unit>, dim3(static_cast<unsigned>(copy.count * shares)),
         dim3(kCopyThreads), 0, stream, copy, static_cast<int>(shares));
}

}  // namespace

void cache_copy_blocks(const CacheCopy& copy, int sm_count, cudaStream_t stream) {
  CacheCopy job = copy;
  if (job.head_stride == job.row_bytes && job.slot_stride == job.heads * job.row_bytes) {
    job.row_bytes *= int64_t{job.heads} * job.slots;  // one row
    job.slots = job.heads = 1;
    job.slot_stride = job.head_stride = 0;
  }
  const auto lies_in = [&](int64_t bytes) {
    return (static_cast<int64_t>(reinterpret_cast<uintptr_t>(job.data)) | job.block_stride |
            job.slot_stride | job.head_stride | job.row_bytes) %
               bytes ==
           0;
  };
  if (lies_in(16)) return launch_copy<uint4>(job, sm_count, stream);
  if (lies_in(4)) return launch_copy<uint32_t>(job, sm_count, stream);
  if (lies_in(2)) return launch_copy<uint16_t>(job, sm_count, stream);
  launch_copy<uint8_t>(job, sm_count, stream);
}

}  // namespace pumice::cuda
