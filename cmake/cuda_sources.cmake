# The CUDA kernels: libpumice_cuda by nvcc (cuda.cmake), libpumice_emulated by the C++ compiler
# (tests/emulator).
set(PUMICE_CUDA_SOURCES
  csrc/cuda/quantize/int8_quantize.cu
  csrc/cuda/quantize/int4_weight.cu
  csrc/cuda/gemm/int8_gemm.cu
  csrc/cuda/gemm/int8_small_m.cu
  csrc/cuda/gemm/ops_int8.cu
  csrc/cuda/gemm/int4_prepare.cu
  csrc/cuda/gemm/int4_gemm_fp16.cu
  csrc/cuda/gemm/int4_gemm_bf16.cu
  csrc/cuda/gemm/int4_gemm_fp32.cu
  csrc/cuda/gemm/int4_dequantized.cu
  csrc/cuda/gemm/ops_int4.cu
  csrc/cuda/attention/flash_forward_fp16.cu
  csrc/cuda/attention/flash_forward_bf16.cu
  csrc/cuda/attention/flash_forward_fp32.cu
  csrc/cuda/attention/flash_merge.cu
  csrc/cuda/attention/merge_attention.cu
  csrc/cuda/attention/attention_mask_pack.cu
  csrc/cuda/attention/attention_align.cu
  csrc/cuda/attention/ops_attention.cu
  csrc/cuda/attention/flash_backward_rows.cu
  csrc/cuda/attention/flash_backward_fp16.cu
  csrc/cuda/attention/flash_backward_bf16.cu
  csrc/cuda/attention/flash_backward_fp32.cu
  csrc/cuda/attention/ops_attention_backward.cu)
