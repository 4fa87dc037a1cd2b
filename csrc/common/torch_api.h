// What pumice uses of torch: the stable ABI, nothing else. Host code only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

// The emulator (tests/emulator) registers the same schemas and the CUDA launchers a second time, as
// CPU operators of the namespace pumice_emulated.
#ifdef PUMICE_EMULATED
#define PUMICE_NAMESPACE pumice_emulated
#define PUMICE_CUDA_DISPATCH_KEY CPU
#else
#define PUMICE_NAMESPACE pumice
#define PUMICE_CUDA_DISPATCH_KEY CUDA
#endif

// One more level, so that the namespace is expanded before torch's macros paste it.
#define PUMICE_EXPAND_LIBRARY(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define PUMICE_EXPAND_IMPL(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
#define PUMICE_LIBRARY(m) PUMICE_EXPAND_LIBRARY(PUMICE_NAMESPACE, m)
#define PUMICE_CPU_IMPL(m) PUMICE_EXPAND_IMPL(PUMICE_NAMESPACE, CPU, m)
#define PUMICE_CUDA_IMPL(m) PUMICE_EXPAND_IMPL(PUMICE_NAMESPACE, PUMICE_CUDA_DISPATCH_KEY, m)

// The message names the operator; then what came and what is accepted.
#define PUMICE_CHECK(condition, op, ...) STD_TORCH_CHECK(condition, op, ": ", __VA_ARGS__)

namespace pumice {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_floating_activation(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}

// The shape of x with its last dimension replaced.
inline std::vector<int64_t> shape_with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = last;
  return sizes;
}

inline std::vector<int64_t> leading_shape(const Tensor& x) {
  return {x.sizes().begin(), x.sizes().end() - 1};
}

inline bool same_device(const Tensor& a, const Tensor& b) { return a.device() == b.device(); }

}  // namespace pumice
