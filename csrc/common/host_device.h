// Functions that host and device code share.
#pragma once

#if defined(__CUDACC__)
#define PUMICE_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Internal to each file and always inlined: the CPU kernels are compiled once per instruction set,
// and a shared inline function would be kept in only one of those versions.
#define PUMICE_HOST_DEVICE static inline __attribute__((always_inline))
#endif

// The same for member functions, which cannot be static in that sense.
#if defined(__CUDACC__)
#define PUMICE_HOST_DEVICE_MEMBER __host__ __device__ __forceinline__
#else
#define PUMICE_HOST_DEVICE_MEMBER inline __attribute__((always_inline))
#endif
