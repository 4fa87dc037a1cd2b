# The CUDA kernels: libpumice_cuda by nvcc (cuda.cmake), libpumice_emulated by the C++ compiler
# (tests/emulator).
set(PUMICE_CUDA_SOURCES)
