// The emulator's test kernels, as operators: under the emulator of CPU tensors in the namespace
// pumice_selftest, by nvcc of CUDA tensors in pumice_selftest_cuda.
#pragma once

#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/tensor_access.h"

#ifdef PUMICE_EMULATED
#define SELFTEST_NAMESPACE pumice_selftest
#define SELFTEST_KEY CPU
#else
#define SELFTEST_NAMESPACE pumice_selftest_cuda
#define SELFTEST_KEY CUDA
#endif
#define SELFTEST_IMPL(m) PUMICE_EXPAND_IMPL(SELFTEST_NAMESPACE, SELFTEST_KEY, m)
#define SELFTEST_LIBRARY(m) PUMICE_EXPAND_LIBRARY(SELFTEST_NAMESPACE, m)
