# pumice_catalogue.h: build information and, for each kernel, the digest of its sources.
set(PUMICE_GENERATED_DIR "${CMAKE_BINARY_DIR}/generated")
add_custom_target(pumice_catalogue
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_SOURCE_DIR}/cmake/catalogue.py"
    --root "${CMAKE_SOURCE_DIR}/csrc"
    --out "${PUMICE_GENERATED_DIR}/pumice_catalogue.h"
    --compiler "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
    --torch "${PUMICE_TORCH_VERSION}"
    --cuda "${CMAKE_CUDA_COMPILER_VERSION}"
    --cuda-architectures "${CMAKE_CUDA_ARCHITECTURES}"
    --cpu-isas "${PUMICE_CPU_ISAS}"
    --cpu-sources "${PUMICE_CPU_ISA_SOURCES}"
    --cuda-sources "${PUMICE_CUDA_SOURCES}"
  BYPRODUCTS "${PUMICE_GENERATED_DIR}/pumice_catalogue.h"
  COMMENT "Kernel catalogue" VERBATIM)
