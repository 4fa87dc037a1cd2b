// Memory and grain of work of the CPU operators.
#pragma once

#include <algorithm>

#include "common/torch_api.h"

namespace pumice::cpu {

// So many elements to quantize, or 64 times as many multiplications, are worth a thread (some 10
// µs).
constexpr int64_t kGrain = 1 << 16;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pieces of one uninitialised allocation, each beginning a cache line.
class Workspace {
 public:
  template <typename T>
  size_t reserve(int64_t count) {
    const size_t offset = size_;
    size_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return offset;
  }
  void allocate(const Tensor& like) {
    memory_ = torch::stable::new_empty(like, {static_cast<int64_t>(size_)}, ScalarType::Byte);
    base_ = static_cast<char*>(memory_.mutable_data_ptr());
  }
  template <typename T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

 private:
  size_t size_ = 0;
  Tensor memory_;
  char* base_ = nullptr;
};

// f(begin, end) on ranges of the m rows of k elements, in parallel.
template <typename F>
void for_rows(int64_t m, int64_t k, const F& f) {
  torch::stable::parallel_for(0, m, std::max<int64_t>(1, kGrain / k), f);
}

}  // namespace pumice::cpu
