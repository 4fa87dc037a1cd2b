// The activation types in a kernel.
#pragma once

#include "common/dtype.h"
#include "cuda/device.h"

namespace pumice::cuda {

// The same bits as another type. (Registers: nothing is copied.)
template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(static_cast<void*>(&to), &from, sizeof(to));
  return to;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Element i of a vector whose type is known at run time; 0 where there is no vector.
__device__ __forceinline__ float element_or_zero(const VectorView& vector, int64_t i) {
  if (vector.data == nullptr) return 0.0f;
  switch (vector.dtype) {
    case DType::kFloat16:
      return to_float(static_cast<const __half*>(vector.data)[i]);
    case DType::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(vector.data)[i]);
    default:
      return static_cast<const float*>(vector.data)[i];
  }
}

// The same for writing.
__device__ __forceinline__ void store_element(void* vector, DType dtype, int64_t i, float value) {
  switch (dtype) {
    case DType::kFloat16:
      static_cast<__half*>(vector)[i] = from_float<__half>(value);
      break;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(vector)[i] = from_float<__nv_bfloat16>(value);
      break;
    default:
      static_cast<float*>(vector)[i] = value;
  }
}

// function(T{}) for the C++ type of dtype, on the host.
template <class Function>
void dispatch_element(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat16:
      return function(__half{});
    case DType::kBFloat16:
      return function(__nv_bfloat16{});
    default:
      return function(float{});
  }
}

}  // namespace pumice::cuda
