// The one way a kernel is launched. Host code only.
#pragma once

#include <utility>

#include "common/torch_api.h"
#include "cuda/device.h"

#ifdef PUMICE_EMULATED
#include "emulator/launch.h"
#else
#include <cxxabi.h>

#include <cstdlib>
#include <string>
#endif

namespace pumice::cuda {

#ifdef PUMICE_EMULATED

// Runs the kernel at once, thread by thread, and throws what the emulator found wrong with it.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t /*stream*/, Arguments&&... arguments) {
  emulator::launch(kernel, grid, block, shared_bytes, std::forward<Arguments>(arguments)...);
}

// Stream-ordered memset(pointer, 0, bytes), for counters and flags.
inline void fill_zero(void* pointer, size_t bytes, cudaStream_t /*stream*/) {
  emulator::fill_zero(pointer, bytes);
}

#else

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a failed launch must not be blamed on whatever comes next
  STD_TORCH_CHECK(false, "pumice: ", what, " failed: ", cudaGetErrorString(status));
}

inline std::string kernel_name(const void* kernel) {
  const char* mangled = nullptr;
  if (cudaFuncGetName(&mangled, kernel) != cudaSuccess) return "a kernel";
  int status = 0;
  char* readable = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  std::string name = status == 0 ? readable : mangled;
  std::free(readable);
  return name;
}

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...), any shared memory size the device
// has, failing by an exception that names the kernel.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, Arguments&&... arguments) {
  cudaError_t status = cudaSuccess;
  constexpr size_t kWithoutOptIn = 48 * 1024;
  if (shared_bytes > kWithoutOptIn) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared_bytes));
  }
  if (status == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    status = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  }
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a failed launch must not be blamed on whatever comes next
  STD_TORCH_CHECK(false, "pumice: launch of ", kernel_name(reinterpret_cast<const void*>(kernel)),
                  " failed: ", cudaGetErrorString(status), " (grid ", grid.x, "x", grid.y, "x",
                  grid.z, ", block ", block.x, "x", block.y, "x", block.z, ", ", shared_bytes,
                  " bytes of shared memory)");
}

// Stream-ordered memset(pointer, 0, bytes), for counters and flags.
inline void fill_zero(void* pointer, size_t bytes, cudaStream_t stream) {
  check_cuda(cudaMemsetAsync(pointer, 0, bytes, stream), "cudaMemsetAsync");
}

#endif

}  // namespace pumice::cuda
