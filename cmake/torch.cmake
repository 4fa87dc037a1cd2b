# The torch beside this interpreter, as an imported target `torch_stable` limited to the stable ABI.
# find_package(Torch) is not used: it rewrites CUDA architectures and flags (pytorch#115937).
#
# Under pip's build isolation torch is not importable, but it lies in the environment's own
# site-packages; any version from 2.10 on gives the same binary, so that one is as good as another.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c [[
import importlib.util, os, re, sysconfig
spec = importlib.util.find_spec("torch")
places = list(spec.submodule_search_locations) if spec else []
places += [os.path.join(sysconfig.get_path(k), "torch") for k in ("purelib", "platlib")]
for place in places:
    version = os.path.join(place, "version.py")
    if os.path.exists(version):
        found = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", open(version).read()).group(1)
        print(place, found, sep=";", end="")
        break
]]
  OUTPUT_VARIABLE torch_found COMMAND_ERROR_IS_FATAL ANY)
if(NOT torch_found)
  message(FATAL_ERROR "pumice: no torch in this Python environment. Install torch >= 2.10 first "
                      "(pip install torch), then install pumice.")
endif()
list(GET torch_found 0 PUMICE_TORCH_DIR)
list(GET torch_found 1 PUMICE_TORCH_VERSION)
if(PUMICE_TORCH_VERSION VERSION_LESS 2.10)
  message(FATAL_ERROR "pumice: torch ${PUMICE_TORCH_VERSION} found, 2.10 or newer is needed.")
endif()
message(STATUS "pumice: building beside torch ${PUMICE_TORCH_VERSION}")

# 0x020a… is 2.10: nothing newer than that release's stable ABI can be used by mistake.
add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${PUMICE_TORCH_DIR}/include")
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000
                                                  TORCH_STABLE_ONLY)
cmake_path(GET CMAKE_CURRENT_LIST_DIR PARENT_PATH repository)
target_compile_options(torch_stable INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-ffile-prefix-map=${repository}/=>)
# torch loads itself with local symbols, so our libraries must name it as needed.
target_link_options(torch_stable INTERFACE -Wl,--no-as-needed)
target_link_libraries(torch_stable INTERFACE "${PUMICE_TORCH_DIR}/lib/libtorch_cpu.so"
                                             "${PUMICE_TORCH_DIR}/lib/libtorch.so")
