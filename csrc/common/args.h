// Checks of arguments that the operators share. Python has validated before (python/pumice/ops/);
// this is the second wall, for callers of torch.ops.
#pragma once

#include "common/dtype.h"
#include "common/torch_api.h"

namespace pumice {

inline DType to_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat32;
  }
}

inline VectorView view_of(const std::optional<Tensor>& vector) {
  if (!vector) return {};
  return {vector->data_ptr(), to_dtype(vector->scalar_type())};
}

// A contiguous floating-point vector of `size` elements on the device of `like`.
inline void check_vector(const char* op, const char* name, const Tensor& vector, int64_t size,
                         const Tensor& like) {
  PUMICE_CHECK(vector.dim() == 1 && vector.size(0) == size, op, name, " must be a vector of ", size,
               " elements, not of ", vector.numel());
  PUMICE_CHECK(is_floating_activation(vector.scalar_type()), op, name,
               " must be float32, float16 or bfloat16");
  PUMICE_CHECK(same_device(vector, like), op, name, " must be on the device of the input");
  PUMICE_CHECK(vector.is_contiguous(), op, name, " must be contiguous");
}

inline void check_float32(const char* op, const char* name, const Tensor& tensor) {
  PUMICE_CHECK(tensor.scalar_type() == ScalarType::Float, op, name, " must be float32");
}

}  // namespace pumice
