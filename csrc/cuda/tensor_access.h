// How a launcher gets from tensors to pointers, streams and device properties. Host code only.
//
// Every launcher opens a DeviceGuard first, and hands a kernel only pointers made by read_pointer,
// write_pointer or read_view: on a GPU these are the tensors' own addresses; the emulator makes
// guarded copies, and reports any other memory that a kernel touches.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <mutex>
#include <type_traits>

#include "common/int8_args.h"
#include "common/torch_api.h"
#include "cuda/device.h"
#include "cuda/launch.h"

#ifdef PUMICE_EMULATED
#include "emulator/device_memory.h"
#endif

namespace pumice::cuda {

// What a launcher chooses tiles and grid sizes by.
struct DeviceProperties {
  int sm_count;
  int compute_capability;      // 80, 90, ...
  size_t shared_memory_limit;  // bytes that one block may ask for
  size_t l2_bytes;
  int64_t workspace_limit;  // bytes of a weight written out for a product at a time
};

namespace internal {

template <class T>
void check_element_size(const Tensor& tensor) {
  if constexpr (!std::is_void_v<T>) {
    STD_TORCH_CHECK(tensor.element_size() == sizeof(T), "pumice: a tensor of ",
                    tensor.element_size(), "-byte elements was taken for one of ", sizeof(T));
  }
}

}  // namespace internal

#ifdef PUMICE_EMULATED

// While it lives, this thread alone uses the emulated device; at its end the memory handed out for
// the tensors is gone.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& /*tensor*/) {}

 private:
  emulator::DeviceScope scope_;
};

template <class T>
const T* read_pointer(const Tensor& tensor) {
  internal::check_element_size<T>(tensor);
  return static_cast<const T*>(emulator::map_tensor(tensor, emulator::Access::kRead));
}

template <class T>
T* write_pointer(const Tensor& tensor) {
  internal::check_element_size<T>(tensor);
  return static_cast<T*>(emulator::map_tensor(tensor, emulator::Access::kReadWrite));
}

inline cudaStream_t current_stream(const Tensor& /*tensor*/) { return nullptr; }

// A small Ampere: few SMs, so that small tests already fill it, and run persistent loops twice.
inline DeviceProperties device_properties(const Tensor& /*tensor*/) {
  return {.sm_count = 4,
          .compute_capability = 80,
          .shared_memory_limit = emulator::kSharedMemoryLimit,
          .l2_bytes = 1 << 20,
          .workspace_limit = 1 << 18};  // small tests cut weights into parts
}

#else

// The tensor's device is the current one while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& tensor) : guard_(tensor.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

template <class T>
const T* read_pointer(const Tensor& tensor) {
  internal::check_element_size<T>(tensor);
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* write_pointer(const Tensor& tensor) {
  internal::check_element_size<T>(tensor);
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0,
                  "pumice: torch has no current CUDA stream for device ",
                  tensor.get_device_index());
  return static_cast<cudaStream_t>(stream);
}

// Asked for once a device: an attribute costs about as much as a launch.
inline const DeviceProperties& device_properties(const Tensor& tensor) {
  constexpr int kMaxDevices = 64;
  static std::array<DeviceProperties, kMaxDevices> properties;
  static std::array<std::once_flag, kMaxDevices> asked;
  const int device = tensor.get_device_index();
  STD_TORCH_CHECK(device >= 0 && device < kMaxDevices, "pumice: CUDA device ", device,
                  " is out of range");
  std::call_once(asked[device], [device] {
    const auto attribute = [device](cudaDeviceAttr name) {
      int value = 0;
      check_cuda(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
      return value;
    };
    properties[device] = {.sm_count = attribute(cudaDevAttrMultiProcessorCount),
                          .compute_capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                                                attribute(cudaDevAttrComputeCapabilityMinor),
                          .shared_memory_limit = static_cast<size_t>(
                              attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)),
                          .l2_bytes = static_cast<size_t>(attribute(cudaDevAttrL2CacheSize)),
                          .workspace_limit = int64_t{512} << 20};  // 8192 × 28672 in 16 bit
  });
  return properties[device];
}

#endif

// view_of() (common/int8_args.h) for a kernel: the vector's pointer on the device.
inline VectorView read_view(const std::optional<Tensor>& vector) {
  if (!vector) return {};
  return {read_pointer<void>(*vector), to_dtype(vector->scalar_type())};
}

}  // namespace pumice::cuda
