// Atomic operations, on shared and on global memory. Included by device.h.
//
// Threads take turns only at collectives, so that a plain read and write is atomic here; what makes
// it an atomic operation is that the checker counts it as one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "emulator/runtime.h"

namespace pumice::emulator {

// The types CUDA has integer atomics for.
template <class T>
concept AtomicInteger =
    std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>;

template <class T, class Update>
PUMICE_EMULATOR_UNCHECKED inline T atomic_update(T* address, Update update) {
  check_atomic(address, sizeof(T));
  const T old = *address;
  *address = update(old);
  return old;
}

}  // namespace pumice::emulator

template <class T>
  requires pumice::emulator::AtomicInteger<T> || std::is_same_v<T, float> ||
           std::is_same_v<T, double> || std::is_same_v<T, __half> ||
           std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half2> ||
           std::is_same_v<T, __nv_bfloat162>
inline T atomicAdd(T* address, std::type_identity_t<T> value) {
  return pumice::emulator::atomic_update(address, [value](T old) { return T(old + value); });
}

template <pumice::emulator::AtomicInteger T>
inline T atomicSub(T* address, std::type_identity_t<T> value) {
  return pumice::emulator::atomic_update(address, [value](T old) { return T(old - value); });
}

template <pumice::emulator::AtomicInteger T>
inline T atomicMin(T* address, std::type_identity_t<T> value) {
  return pumice::emulator::atomic_update(address,
                                         [value](T old) { return value < old ? value : old; });
}

template <pumice::emulator::AtomicInteger T>
inline T atomicMax(T* address, std::type_identity_t<T> value) {
  return pumice::emulator::atomic_update(address,
                                         [value](T old) { return old < value ? value : old; });
}

template <pumice::emulator::AtomicInteger T>
inline T atomicAnd(T* address, std::type_identity_t<T> value) {
  return pumice::emulator::atomic_update(address, [value](T old) { return T(old & value); });
}

template <pumice::emulator::AtomicInteger T>
inline T atomicOr(T* address, std::type_identity_t<T> value) {
  return pumice::emulator::atomic_update(address, [value](T old) { return T(old | value); });
}

template <pumice::emulator::AtomicInteger T>
inline T atomicXor(T* address, std::type_identity_t<T> value) {
  return pumice::emulator::atomic_update(address, [value](T old) { return T(old ^ value); });
}

template <class T>
  requires pumice::emulator::AtomicInteger<T> || std::is_same_v<T, float>
inline T atomicExch(T* address, std::type_identity_t<T> value) {
  return pumice::emulator::atomic_update(address, [value](T) { return value; });
}

template <class T>
  requires pumice::emulator::AtomicInteger<T> || std::is_same_v<T, unsigned short>
inline T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return pumice::emulator::atomic_update(
      address, [expected, value](T old) { return old == expected ? value : old; });
}

// Counts up to `limit`, then wraps to 0.
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return pumice::emulator::atomic_update(
      address, [limit](unsigned old) { return old >= limit ? 0u : old + 1; });
}
