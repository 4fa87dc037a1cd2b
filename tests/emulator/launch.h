// Running a kernel: the emulator's half of pumice::cuda::launch. Host code.
#pragma once

#include <cstddef>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulator/device_memory.h"
#include "emulator/runtime.h"

namespace pumice::emulator {

// Runs invoke(closure) for every thread of the grid; throws std::runtime_error on any fault.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*invoke)(void*), void* closure,
              const void* kernel);

template <class... Parameters>
struct Call {
  void (*kernel)(Parameters...);
  std::tuple<Parameters...> arguments;

  // The arguments lie on the host's stack, which the kernel itself may not read: they are passed by
  // value from unchecked code.
  PUMICE_EMULATOR_UNCHECKED static void invoke(void* self) {
    invoke_with(*static_cast<Call*>(self), std::index_sequence_for<Parameters...>());
  }

 private:
  template <size_t... kIndex>
  PUMICE_EMULATOR_UNCHECKED static void invoke_with(Call& call, std::index_sequence<kIndex...>) {
    call.kernel(std::get<kIndex>(call.arguments)...);
  }
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            Arguments&&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...),
                "kernel parameters are copied to the device byte by byte");
  static_assert(sizeof(std::tuple<Parameters...>) <= 4096, "kernel parameters are limited to 4 KB");
  Call<Parameters...> call{kernel, {std::forward<Arguments>(arguments)...}};
  run_grid(grid, block, shared_bytes, &Call<Parameters...>::invoke, &call,
           reinterpret_cast<const void*>(kernel));
}

}  // namespace pumice::emulator
