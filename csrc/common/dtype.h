// The activation types, as a kernel sees them at run time.
#pragma once

#include <cstdint>

namespace pumice {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// A vector read element by element, of a type known at run time (bias). A null pointer means
// absent.
struct VectorView {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};

}  // namespace pumice
