// One warp executes one mma.sp; registers go in and out as they are.
#include <string>

#include "cuda/ptx/mma_sp.h"
#include "selftest.h"

namespace pumice::cuda {
namespace {

template <class Accumulator, void (*kInstruction)(Accumulator (&)[4], const uint32_t (&)[4],
                                                  const uint32_t (&)[4], uint32_t)>
__global__ void mma_sp_probe(const uint32_t* a, const uint32_t* b, const uint32_t* metadata,
                             Accumulator* d) {
  const int lane = lane_index();
  uint32_t a_registers[4], b_registers[4];
  Accumulator d_registers[4];
  for (int i = 0; i < 4; ++i) {
    a_registers[i] = a[4 * lane + i];
    b_registers[i] = b[4 * lane + i];
    d_registers[i] = d[4 * lane + i];
  }
  kInstruction(d_registers, a_registers, b_registers, metadata[lane]);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = d_registers[i];
}

void mma_sp(std::string type, int64_t selector, const Tensor& a, const Tensor& b,
            const Tensor& metadata, const Tensor& d) {
  const DeviceGuard guard(a);
  const auto run = [&](auto kernel, auto* registers) {
    launch(kernel, 1, kWarpSize, 0, current_stream(a), read_pointer<uint32_t>(a),
           read_pointer<uint32_t>(b), read_pointer<uint32_t>(metadata), registers);
  };
  if (type == "s8") run(mma_sp_probe<int32_t, ptx::mma_sp_m16n8k64_s8>, write_pointer<int32_t>(d));
  if (type == "f16") {
    run(selector == 0 ? mma_sp_probe<float, ptx::mma_sp_m16n8k32_f16<0>>
                      : mma_sp_probe<float, ptx::mma_sp_m16n8k32_f16<1>>,
        write_pointer<float>(d));
  }
  if (type == "bf16") {
    run(selector == 0 ? mma_sp_probe<float, ptx::mma_sp_m16n8k32_bf16<0>>
                      : mma_sp_probe<float, ptx::mma_sp_m16n8k32_bf16<1>>,
        write_pointer<float>(d));
  }
}

}  // namespace
}  // namespace pumice::cuda

SELFTEST_IMPL(m) { m.impl("mma_sp", TORCH_BOX(&pumice::cuda::mma_sp)); }
