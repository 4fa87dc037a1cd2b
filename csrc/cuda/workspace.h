// Scratch memory of a launcher. Host code only.
#pragma once

#include "cuda/tensor_access.h"

namespace pumice::cuda {

// Pieces of one uninitialised allocation, each on a boundary of 256 bytes as from the allocator. It
// may be freed on return: what the stream runs next is ordered after the kernels that use it.
class Workspace {
 public:
  size_t reserve(int64_t bytes) {
    const size_t offset = size_;
    size_ += (static_cast<size_t>(bytes) + 255) / 256 * 256;
    return offset;
  }
  void allocate(const Tensor& like) {
    if (size_ == 0) return;
    memory_ = torch::stable::new_empty(like, {static_cast<int64_t>(size_)}, ScalarType::Byte);
    base_ = write_pointer<uint8_t>(memory_);
  }
  template <class T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

 private:
  size_t size_ = 0;
  Tensor memory_;
  uint8_t* base_ = nullptr;
};

}  // namespace pumice::cuda
