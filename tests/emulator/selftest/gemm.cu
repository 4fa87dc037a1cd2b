// A small but complete tensor-core GEMM: cp.async into two stages, ldmatrix, mma.sync. It shows
// that a correct pipeline passes the checker, and how fast the emulator is.
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mma.h"
#include "selftest.h"

namespace pumice::cuda {
namespace {

// 8 warps, 2 along M and 4 along N, of 32 × 32 each.
constexpr int kBlockM = 64, kBlockN = 128, kBlockK = 64, kThreads = 256, kStages = 2;
constexpr int kPitch = kBlockK + 16;  // 16 bytes apart in the banks from row to row

struct Stage {
  int8_t a[kBlockM][kPitch];
  int8_t b[kBlockN][kPitch];
};

__device__ __forceinline__ void load_tile(int8_t (*shared)[kPitch], const int8_t* global, int rows,
                                          int k) {
  constexpr int kPieces = kBlockK / 16;
  for (int i = threadIdx.x; i < rows * kPieces; i += kThreads) {
    const int row = i / kPieces, column = i % kPieces * 16;
    ptx::cp_async_16(&shared[row][column], global + static_cast<int64_t>(row) * k + column, true);
  }
}

__global__ void __launch_bounds__(kThreads)
    gemm_kernel(const int8_t* a, const int8_t* b, int n, int k, int32_t* y) {
  auto* stages = dynamic_shared_memory<Stage>();
  const int block_m = blockIdx.y * kBlockM, block_n = blockIdx.x * kBlockN;
  const int warp_m = warp_index() / 4 * 32, warp_n = warp_index() % 4 * 32;
  const int lane = lane_index();
  a += static_cast<int64_t>(block_m) * k;
  b += static_cast<int64_t>(block_n) * k;

  const int steps = k / kBlockK;
  const auto load = [&](int step) {
    if (step < steps) {
      load_tile(stages[step % kStages].a, a + step * kBlockK, kBlockM, k);
      load_tile(stages[step % kStages].b, b + step * kBlockK, kBlockN, k);
    }
    ptx::cp_async_commit();
  };
  int32_t accumulator[2][4][4] = {};
  load(0);
  for (int step = 0; step < steps; ++step) {
    load(step + 1);
    ptx::cp_async_wait<1>();
    __syncthreads();
    const Stage& stage = stages[step % kStages];
    for (int kk = 0; kk < kBlockK; kk += 32) {
      uint32_t a_fragment[2][4], b_fragment[4][2];
      for (int i = 0; i < 2; ++i) {
        ptx::ldmatrix_x4(a_fragment[i], &stage.a[warp_m + 16 * i + lane % 16][kk + lane / 16 * 16]);
      }
      for (int j = 0; j < 4; j += 2) {
        ptx::ldmatrix_x4(b_fragment[j][0], b_fragment[j][1], b_fragment[j + 1][0],
                         b_fragment[j + 1][1],
                         &stage.b[warp_n + 8 * (j + lane / 16) + lane % 8][kk + lane / 8 % 2 * 16]);
      }
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 4; ++j) {
          ptx::mma_m16n8k32_s8(accumulator[i][j], a_fragment[i], b_fragment[j]);
        }
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      for (int e = 0; e < 4; ++e) {
        const int m = block_m + warp_m + 16 * i + lane / 4 + e / 2 * 8;
        const int column = block_n + warp_n + 8 * j + lane % 4 * 2 + e % 2;
        y[static_cast<int64_t>(m) * n + column] = accumulator[i][j][e];
      }
    }
  }
}

void gemm(const Tensor& a, const Tensor& b, const Tensor& y) {
  const DeviceGuard guard(a);
  const auto m = static_cast<int>(a.size(0)), n = static_cast<int>(b.size(0)),
             k = static_cast<int>(a.size(1));
  STD_TORCH_CHECK(m % kBlockM == 0 && n % kBlockN == 0 && k % kBlockK == 0, "whole tiles only");
  launch(gemm_kernel, dim3(n / kBlockN, m / kBlockM), kThreads, kStages * sizeof(Stage),
         current_stream(a), read_pointer<int8_t>(a), read_pointer<int8_t>(b), n, k,
         write_pointer<int32_t>(y));
}

}  // namespace
}  // namespace pumice::cuda

SELFTEST_IMPL(m) { m.impl("gemm", TORCH_BOX(&pumice::cuda::gemm)); }
