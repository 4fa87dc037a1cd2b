// One warp executes one PTX wrapper once; registers go in and out as they are.
#include <string>

#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/cvt_e4m3.h"
#include "cuda/ptx/exp2.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/load.h"
#include "cuda/ptx/mma.h"
#include "cuda/ptx/store.h"
#include "selftest.h"

namespace pumice::cuda {
namespace {

template <class Accumulator,
          void (*kInstruction)(Accumulator (&)[4], const uint32_t (&)[4], const uint32_t (&)[2])>
__global__ void mma_probe(const uint32_t* a, const uint32_t* b, Accumulator* d) {
  const int lane = lane_index();
  uint32_t a_registers[4], b_registers[2];
  Accumulator d_registers[4];
  for (int i = 0; i < 4; ++i) a_registers[i] = a[4 * lane + i];
  for (int i = 0; i < 2; ++i) b_registers[i] = b[2 * lane + i];
  for (int i = 0; i < 4; ++i) d_registers[i] = d[4 * lane + i];
  kInstruction(d_registers, a_registers, b_registers);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = d_registers[i];
}

template <int kCount, bool kTranspose>
__global__ void ldmatrix_probe(const uint8_t* bytes, int size, const int* rows, uint32_t* y) {
  auto* shared = dynamic_shared_memory<uint8_t>();
  for (int i = threadIdx.x; i < size; i += kWarpSize) shared[i] = bytes[i];
  __syncthreads();
  const uint8_t* row = shared + rows[lane_index()];
  uint32_t r[4] = {};
  if constexpr (kTranspose) {
    if constexpr (kCount == 1) ptx::ldmatrix_x1_trans(r[0], row);
    if constexpr (kCount == 2) ptx::ldmatrix_x2_trans(r[0], r[1], row);
    if constexpr (kCount == 4) ptx::ldmatrix_x4_trans(r, row);
  } else {
    if constexpr (kCount == 1) ptx::ldmatrix_x1(r[0], row);
    if constexpr (kCount == 2) ptx::ldmatrix_x2(r[0], r[1], row);
    if constexpr (kCount == 4) ptx::ldmatrix_x4(r, row);
  }
  for (int i = 0; i < kCount; ++i) y[kCount * lane_index() + i] = r[i];
}

// valid[t] bytes of piece t of x arrive, the rest of the piece being zero.
template <int kSize>
__global__ void cp_async_probe(const uint8_t* x, const int* valid, uint8_t* y) {
  auto* shared = dynamic_shared_memory<uint8_t>();
  const int t = threadIdx.x;
  uint8_t* destination = shared + kSize * t;
  if constexpr (kSize == 16) ptx::cp_async_16_partial(destination, x + kSize * t, valid[t]);
  if constexpr (kSize == 8) ptx::cp_async_8(destination, x + kSize * t, valid[t] != 0);
  if constexpr (kSize == 4) ptx::cp_async_4(destination, x + kSize * t, valid[t] != 0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  for (int i = 0; i < kSize; ++i) y[kSize * t + i] = destination[i];
}

template <int kSize>
__global__ void load_probe(const uint8_t* x, uint32_t* y) {
  const int t = threadIdx.x;
  if constexpr (kSize == 16) {
    const uint4 v = ptx::load_streaming_16(x + kSize * t);
    y[4 * t] = v.x, y[4 * t + 1] = v.y, y[4 * t + 2] = v.z, y[4 * t + 3] = v.w;
  } else if constexpr (kSize == 8) {
    const uint2 v = ptx::load_streaming_8(x + kSize * t);
    y[2 * t] = v.x, y[2 * t + 1] = v.y;
  } else {
    y[t] = ptx::load_streaming_4(x + kSize * t);
  }
}

__global__ void exp2_probe(const float* x, float* y) {
  y[threadIdx.x] = ptx::exp2_approx(x[threadIdx.x]);
}

__global__ void e4m3_probe(const int* x, int* y) {
  y[threadIdx.x] = static_cast<int>(ptx::e4m3x2_to_f16x2(static_cast<uint32_t>(x[threadIdx.x])));
}

__global__ void store_probe(const uint4* x, uint4* y) {
  ptx::store_16(y + threadIdx.x, x[threadIdx.x]);
}

void mma(std::string type, const Tensor& a, const Tensor& b, const Tensor& d) {
  const DeviceGuard guard(a);
  const auto run = [&](auto kernel, auto* registers) {
    launch(kernel, 1, kWarpSize, 0, current_stream(a), read_pointer<uint32_t>(a),
           read_pointer<uint32_t>(b), registers);
  };
  if (type == "s8") run(mma_probe<int32_t, ptx::mma_m16n8k32_s8>, write_pointer<int32_t>(d));
  if (type == "f16") run(mma_probe<float, ptx::mma_m16n8k16_f16>, write_pointer<float>(d));
  if (type == "bf16") run(mma_probe<float, ptx::mma_m16n8k16_bf16>, write_pointer<float>(d));
}

void ldmatrix(const Tensor& bytes, const Tensor& rows, int64_t count, bool transpose,
              const Tensor& y) {
  const DeviceGuard guard(bytes);
  const auto run = [&](auto kernel) {
    launch(kernel, 1, kWarpSize, bytes.numel(), current_stream(bytes), read_pointer<uint8_t>(bytes),
           static_cast<int>(bytes.numel()), read_pointer<int>(rows), write_pointer<uint32_t>(y));
  };
  if (count == 1) run(transpose ? ldmatrix_probe<1, true> : ldmatrix_probe<1, false>);
  if (count == 2) run(transpose ? ldmatrix_probe<2, true> : ldmatrix_probe<2, false>);
  if (count == 4) run(transpose ? ldmatrix_probe<4, true> : ldmatrix_probe<4, false>);
}

void cp_async(const Tensor& x, const Tensor& valid, int64_t size, const Tensor& y) {
  const DeviceGuard guard(x);
  const auto run = [&](auto kernel) {
    launch(kernel, 1, static_cast<unsigned>(valid.numel()), y.numel(), current_stream(x),
           read_pointer<uint8_t>(x), read_pointer<int>(valid), write_pointer<uint8_t>(y));
  };
  if (size == 16) run(cp_async_probe<16>);
  if (size == 8) run(cp_async_probe<8>);
  if (size == 4) run(cp_async_probe<4>);
}

void load_streaming(const Tensor& x, int64_t size, const Tensor& y) {
  const DeviceGuard guard(x);
  const auto run = [&](auto kernel) {
    launch(kernel, 1, static_cast<unsigned>(x.numel() / size), 0, current_stream(x),
           read_pointer<uint8_t>(x), write_pointer<uint32_t>(y));
  };
  if (size == 16) run(load_probe<16>);
  if (size == 8) run(load_probe<8>);
  if (size == 4) run(load_probe<4>);
}

void exp2(const Tensor& x, const Tensor& y) {
  const DeviceGuard guard(x);
  launch(exp2_probe, 1, static_cast<unsigned>(x.numel()), 0, current_stream(x),
         read_pointer<float>(x), write_pointer<float>(y));
}

void e4m3(const Tensor& x, const Tensor& y) {
  const DeviceGuard guard(x);
  launch(e4m3_probe, 1, static_cast<unsigned>(x.numel()), 0, current_stream(x),
         read_pointer<int32_t>(x), write_pointer<int32_t>(y));
}

void store_16(const Tensor& x, const Tensor& y) {
  const DeviceGuard guard(x);
  launch(store_probe, 1, static_cast<unsigned>(x.numel() / 16), 0, current_stream(x),
         static_cast<const uint4*>(read_pointer<void>(x)),
         static_cast<uint4*>(write_pointer<void>(y)));
}

}  // namespace
}  // namespace pumice::cuda

SELFTEST_IMPL(m) {
  m.impl("mma", TORCH_BOX(&pumice::cuda::mma));
  m.impl("ldmatrix", TORCH_BOX(&pumice::cuda::ldmatrix));
  m.impl("cp_async", TORCH_BOX(&pumice::cuda::cp_async));
  m.impl("exp2", TORCH_BOX(&pumice::cuda::exp2));
  m.impl("e4m3", TORCH_BOX(&pumice::cuda::e4m3));
  m.impl("store_16", TORCH_BOX(&pumice::cuda::store_16));
  m.impl("load_streaming", TORCH_BOX(&pumice::cuda::load_streaming));
}
