// The emulated device's global memory. Host code.
//
// A tensor handed to a kernel is mirrored, storage by storage, at an address of its own with
// nothing around it, so that a kernel that runs off its end cannot land in a neighbour; each launch
// copies the tensors in, and the writable ones out again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#ifdef TORCH_TARGET_VERSION
#include <sstream>

#include "common/torch_api.h"
#endif

namespace pumice::emulator {

enum class Access { kRead, kReadWrite };

struct Cell;  // checker.h

// A part of a storage that a kernel was given.
struct Window {
  uintptr_t begin, end;  // on the device
  uintptr_t host;
  bool writable;
  std::string name;
};

struct Allocation {
  uintptr_t host, device;
  size_t bytes;
  std::vector<Window> windows;
  Cell* shadow = nullptr;  // one a byte, once a window is writable
};

// Holds the device's mutex; the last scope of a thread to close unmaps everything.
class DeviceScope {
 public:
  DeviceScope();
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
};

// Device address of the `bytes` bytes at `data`, inside the storage at `storage`.
void* map_bytes(void* storage, size_t storage_bytes, void* data, size_t bytes, Access access,
                const std::string& name);

void fill_zero(void* device_pointer, size_t bytes);

// For the launcher and the checker.
bool scope_is_open();
void copy_to_device();
void copy_to_host();
bool is_device_address(uintptr_t address);
Allocation* nearest_allocation(uintptr_t address);

#ifdef TORCH_TARGET_VERSION
inline void* map_tensor(const Tensor& tensor, Access access) {
  if (tensor.numel() == 0) return nullptr;
  int64_t storage_bytes = 0;
  STD_TORCH_CHECK(aoti_torch_get_storage_size(tensor.get(), &storage_bytes) == 0,
                  "the tensor has no storage");
  int64_t span = 1;
  std::ostringstream name;
  name << (access == Access::kRead ? "read_pointer" : "write_pointer") << " tensor [";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    span += (tensor.size(i) - 1) * tensor.stride(i);
    name << (i ? ", " : "") << tensor.size(i);
  }
  const int64_t item = tensor.element_size();
  name << "] of " << item << "-byte elements";
  char* data = static_cast<char*>(tensor.data_ptr());
  return map_bytes(data - tensor.storage_offset() * item, storage_bytes, data, span * item, access,
                   name.str());
}
#endif

}  // namespace pumice::emulator
