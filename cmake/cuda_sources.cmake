# The CUDA kernels: libpumice_cuda by nvcc (cuda.cmake), libpumice_emulated by the C++ compiler
# (tests/emulator).
set(PUMICE_CUDA_SOURCES
  csrc/cuda/quantize/int8_quantize.cu
  csrc/cuda/quantize/int4_weight.cu
  csrc/cuda/gemm/int8_gemm.cu
  csrc/cuda/gemm/int8_small_m.cu
  csrc/cuda/gemm/ops_int8.cu
  csrc/cuda/gemm/ops_int4.cu)
