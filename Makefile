# Two commands do everything on a fresh machine with Python 3.10+ and a C++ compiler:
#   make demo   builds pumice, fetches a real model, compresses it, prints the table
#   make test   runs the whole suite, the emulated CUDA kernels included
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BUILD ?= build
# At most one compiler for each 4 GB of memory.
JOBS ?= $(shell awk -v cores="$$(nproc)" '/MemTotal/{m=int($$2/4194304); if(m<1)m=1; print (m<cores)?m:cores}' /proc/meminfo)

BIN := $(VENV)/bin
export CMAKE_BUILD_PARALLEL_LEVEL = $(JOBS)
export PATH := $(abspath $(BIN)):$(PATH)
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt pyproject.toml

.PHONY: demo test lint emulator wheel bench clean help

help:
	@sed -n 's/^#   //p' $(MAKEFILE_LIST)

demo: $(VENV)/.pumice
	$(BIN)/python -m demo

test: $(VENV)/.pumice-dev lint emulator
	PUMICE_REQUIRE_EMULATOR=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.pumice-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The CUDA kernels compiled as C++ for the CPU, with a checker in place of the GPU.
emulator: $(VENV)/.pumice-dev
	$(BIN)/cmake -S tests/emulator -B $(BUILD)/emulator -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) >/dev/null
	$(BIN)/cmake --build $(BUILD)/emulator

wheel: $(VENV)/.pumice-dev
	rm -rf dist wheelhouse
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps -w dist .
	$(BIN)/python -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w wheelhouse dist/*.whl
	@ls -l wheelhouse

bench: $(VENV)/.pumice-dev
	$(BIN)/python -m bench int8 --device cpu

clean:
	rm -rf $(BUILD) dist wheelhouse

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("pumice needs Python 3.10 or newer: make PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH) numpy
	$(BIN)/python -m pip install --quiet 'scikit-build-core>=0.11' pybind11 'cmake>=3.26' ninja
	@touch $@

# Editable: Python files are used from the tree, the binaries are built into the environment.
$(VENV)/.pumice: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --no-build-isolation -e '.[cli]' $(TORCH)
	@touch $@

$(VENV)/.pumice-dev: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --no-build-isolation -e '.[dev]' $(TORCH)
	@touch $@ $(VENV)/.pumice
