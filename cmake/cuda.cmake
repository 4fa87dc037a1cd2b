# libpumice_cuda: the CUDA kernels. Compiles against a CPU-only torch, needs no GPU.
include(${CMAKE_CURRENT_LIST_DIR}/cuda_sources.cmake)

set(PUMICE_CUDA_FOUND OFF)
if(PUMICE_CUDA AND PUMICE_CUDA_SOURCES)
  include(cmake/cuda_architectures.cmake)
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    set(PUMICE_CUDA_FOUND ON)
  endif()
endif()

if(NOT PUMICE_CUDA_FOUND)
  message(STATUS "pumice: CUDA kernels are NOT built (no nvcc, or PUMICE_CUDA=OFF); the CPU library is complete")
  set(CMAKE_CUDA_ARCHITECTURES "")
  return()
endif()

set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
message(STATUS "pumice: CUDA kernels with nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")

# An nvcc takes up to 4 GB: at most one for each 4 GB of memory.
cmake_host_system_information(RESULT memory_mb QUERY TOTAL_PHYSICAL_MEMORY)
math(EXPR cuda_jobs "${memory_mb} / 4096")
if(cuda_jobs LESS 1)
  set(cuda_jobs 1)
endif()
set_property(GLOBAL APPEND PROPERTY JOB_POOLS cuda=${cuda_jobs})

# The current stream lives in libtorch_cuda, which a CPU-only torch lacks: link a one-symbol stub of
# that name, which the real one takes the place of at run time.
file(WRITE "${CMAKE_BINARY_DIR}/stub/torch_cuda_stub.cpp"
  "extern \"C\" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n")
add_library(torch_cuda_stub SHARED "${CMAKE_BINARY_DIR}/stub/torch_cuda_stub.cpp")
set_target_properties(torch_cuda_stub PROPERTIES
  OUTPUT_NAME torch_cuda LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/stub"
  CXX_VISIBILITY_PRESET default)

add_library(pumice_cuda SHARED ${PUMICE_CUDA_SOURCES})
target_include_directories(pumice_cuda PRIVATE csrc)
target_compile_definitions(pumice_cuda PRIVATE USE_CUDA)
target_compile_options(pumice_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:
  --compress-mode=size --threads=1 -Xptxas=--warn-on-spills
  -Xcompiler=-ffile-prefix-map=${CMAKE_SOURCE_DIR}/=>)
target_link_libraries(pumice_cuda PRIVATE torch_stable torch_cuda_stub)
set_target_properties(pumice_cuda PROPERTIES JOB_POOL_COMPILE cuda)
