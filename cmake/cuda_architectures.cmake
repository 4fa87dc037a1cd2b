# CMAKE_CUDA_ARCHITECTURES, which must be set before enable_language(CUDA), or CMake chooses one
# architecture of its own. In order: the caller's, TORCH_CUDA_ARCH_LIST ("8.0 9.0a 9.0+PTX"), and by
# default machine code for sm_80 and sm_90 with PTX of the last for GPUs newer than this build.
if(DEFINED CMAKE_CUDA_ARCHITECTURES)
  return()
endif()
if(NOT "$ENV{TORCH_CUDA_ARCH_LIST}" STREQUAL "")
  string(REGEX REPLACE "[ ,;]+" ";" arch_list "$ENV{TORCH_CUDA_ARCH_LIST}")
  foreach(arch IN LISTS arch_list)
    if(NOT arch MATCHES "^([0-9]+)\\.([0-9]+[af]?)(\\+PTX)?$")
      message(FATAL_ERROR
        "pumice: TORCH_CUDA_ARCH_LIST entry '${arch}' is neither like 8.0 nor like 9.0+PTX")
    endif()
    if(CMAKE_MATCH_3)
      list(APPEND CMAKE_CUDA_ARCHITECTURES "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
    else()
      list(APPEND CMAKE_CUDA_ARCHITECTURES "${CMAKE_MATCH_1}${CMAKE_MATCH_2}-real")
    endif()
  endforeach()
else()
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
endif()
