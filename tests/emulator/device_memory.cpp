#include "emulator/device_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>

#include "emulator/checker.h"

namespace pumice::emulator {
namespace {

constexpr size_t kDeviceBytes = size_t{64} << 30;  // of address space
constexpr size_t kGuardBytes = 1 << 20;
constexpr size_t kAlignment = 512;  // what torch's CUDA allocator gives every storage

std::recursive_mutex device_mutex;
thread_local int open_scopes = 0;  // only the thread that holds the mutex has any
std::vector<std::unique_ptr<Allocation>> allocations;  // by ascending device address
uintptr_t next_address = 0;

uintptr_t device_base() {
  static const uintptr_t base = [] {
    void* memory = mmap(nullptr, kDeviceBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulator: no address space for the device");
    return reinterpret_cast<uintptr_t>(memory);
  }();
  return base;
}

Allocation& find_or_allocate(uintptr_t host, size_t bytes) {
  for (const auto& allocation : allocations) {
    if (allocation->host == host && allocation->bytes == bytes) return *allocation;
  }
  if (next_address == 0) next_address = device_base() + kGuardBytes;
  const uintptr_t device = (next_address + kAlignment - 1) / kAlignment * kAlignment;
  next_address = device + bytes + kGuardBytes;
  if (next_address > device_base() + kDeviceBytes) {
    throw std::runtime_error("emulator: out of device memory");
  }
  auto allocation = std::make_unique<Allocation>();
  allocation->host = host;
  allocation->device = device;
  allocation->bytes = bytes;
  return *allocations.emplace_back(std::move(allocation));
}

void make_shadow(Allocation& allocation) {
  if (allocation.shadow) return;
  void* memory = mmap(nullptr, allocation.bytes * sizeof(Cell), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("emulator: no memory for the race checker");
  allocation.shadow = static_cast<Cell*>(memory);
}

}  // namespace

DeviceScope::DeviceScope() {
  device_mutex.lock();
  ++open_scopes;
}

DeviceScope::~DeviceScope() {
  if (--open_scopes == 0) {
    for (const auto& allocation : allocations) {
      if (allocation->shadow) munmap(allocation->shadow, allocation->bytes * sizeof(Cell));
    }
    if (!allocations.empty()) {
      madvise(reinterpret_cast<void*>(device_base()), next_address - device_base(), MADV_DONTNEED);
    }
    allocations.clear();
    next_address = 0;
  }
  device_mutex.unlock();
}

void* map_bytes(void* storage, size_t storage_bytes, void* data, size_t bytes, Access access,
                const std::string& name) {
  if (!scope_is_open()) {
    throw std::runtime_error("emulator: a launcher took a pointer before it opened a DeviceGuard");
  }
  Allocation& allocation = find_or_allocate(reinterpret_cast<uintptr_t>(storage), storage_bytes);
  const uintptr_t host = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = allocation.device + (host - allocation.host);
  const bool writable = access == Access::kReadWrite;
  if (writable) make_shadow(allocation);
  allocation.windows.push_back({begin, begin + bytes, host, writable, name});
  return reinterpret_cast<void*>(begin);
}

void fill_zero(void* device_pointer, size_t bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(device_pointer);
  if (bytes == 0) return;
  if (Allocation* allocation = nearest_allocation(address)) {
    for (const Window& window : allocation->windows) {
      if (window.writable && window.begin <= address && address + bytes <= window.end) {
        std::memset(reinterpret_cast<void*>(window.host + (address - window.begin)), 0, bytes);
        return;
      }
    }
  }
  throw std::runtime_error("emulator: fill_zero outside of the tensors given by write_pointer");
}

bool scope_is_open() { return open_scopes > 0; }

void copy_to_device() {
  for (const auto& allocation : allocations) {
    for (const Window& window : allocation->windows) {
      std::memcpy(reinterpret_cast<void*>(window.begin), reinterpret_cast<void*>(window.host),
                  window.end - window.begin);
    }
  }
}

void copy_to_host() {
  for (const auto& allocation : allocations) {
    for (const Window& window : allocation->windows) {
      if (!window.writable) continue;
      std::memcpy(reinterpret_cast<void*>(window.host), reinterpret_cast<void*>(window.begin),
                  window.end - window.begin);
    }
  }
}

bool is_device_address(uintptr_t address) { return address - device_base() < kDeviceBytes; }

Allocation* nearest_allocation(uintptr_t address) {
  Allocation* nearest = nullptr;
  uintptr_t best = UINTPTR_MAX;
  for (const auto& allocation : allocations) {
    const uintptr_t end = allocation->device + allocation->bytes;
    const uintptr_t distance = address < allocation->device ? allocation->device - address
                               : address < end              ? 0
                                                            : address - end + 1;
    if (distance < best) {
      best = distance;
      nearest = allocation.get();
    }
  }
  return nearest;
}

}  // namespace pumice::emulator
