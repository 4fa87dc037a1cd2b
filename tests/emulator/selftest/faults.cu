// The operator `fault`, and the faults that lie with the launcher.
#include "faults.h"

namespace pumice::cuda {
namespace {

__global__ void copies(const float* x, float* y) { y[THREAD_ELEMENT] = x[threadIdx.x]; }

void fault(std::string name, bool repaired, const Tensor& x, const Tensor& y) {
  std::optional<DeviceGuard> guard;
  if (name != "missing_device_guard" || repaired) guard.emplace(x);
  const auto run = [&](FaultKernel kernel, size_t shared_bytes = kSharedBytes) {
    launch(kernel, kBlocks, kThreads, shared_bytes, current_stream(x), read_pointer<float>(x),
           write_pointer<float>(y));
  };
  for (const FaultTable& table : {thread_faults(), async_faults(), global_faults()}) {
    const auto found = table.find(name);
    if (found != table.end()) return run(found->second[repaired]);
  }
  if (name == "missing_device_guard") return run(copies);
  if (name == "too_much_shared_memory") return run(copies, repaired ? kSharedBytes : 1 << 20);
  if (name == "pointer_of_the_host") {
    const auto* host = static_cast<const float*>(x.data_ptr());
    return launch(copies, kBlocks, kThreads, 0, current_stream(x),
                  repaired ? read_pointer<float>(x) : host, write_pointer<float>(y));
  }
  STD_TORCH_CHECK(false, "no fault is called ", name);
}

}  // namespace
}  // namespace pumice::cuda

SELFTEST_IMPL(m) { m.impl("fault", TORCH_BOX(&pumice::cuda::fault)); }
