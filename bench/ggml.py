"""ggml's matrix product on the CPU, by ctypes, as a peer of the int4 linear.

The libraries are those of an installed ``llama-cpp-python``, or lie in the folder that
``PUMICE_BENCH_GGML`` names (libggml-base.so and libggml-cpu.so, of any build of llama.cpp).

Weights are quantized by ggml itself and, as llama.cpp does, repacked for the instruction set at
hand where it can. Activations are float32, which ggml rounds to int8 in every product.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import weakref
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch

from bench.cases import UnavailableError
from bench.timing import Contender

TYPES = {"q4_0": 2, "q4_K": 12}  # enum ggml_type; groups of 32 with a scale, of 256 with 8 of each
_F32 = 0


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
# A line for each tensor that is repacked would hide the tables.
_say_nothing = _LogCallback(lambda level, text, data: None)

# What is called, all of ggml.h, ggml-alloc.h, ggml-backend.h and ggml-cpu.h: result, arguments.
_FUNCTIONS = {
    "ggml_log_set": (None, [_LogCallback, c_void_p]),
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_quantize_chunk": (
        c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, ctypes.POINTER(c_float)],
    ),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_free": (None, [c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_get_default_buffer_type": (c_void_p, [c_void_p]),
    "ggml_backend_get_device": (c_void_p, [c_void_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_dev_backend_reg": (c_void_p, [c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
}  # fmt: skip


@functools.cache
def _library() -> ctypes.CDLL:
    folder = os.environ.get("PUMICE_BENCH_GGML")
    if folder is None:
        package = importlib.util.find_spec("llama_cpp")
        if package is None or not package.submodule_search_locations:
            raise UnavailableError(
                "llama-cpp-python is not installed, nor does PUMICE_BENCH_GGML name a folder"
            )
        folder = str(Path(package.submodule_search_locations[0]) / "lib")
    try:
        ctypes.CDLL(str(Path(folder) / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(str(Path(folder) / "libggml-cpu.so"))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise UnavailableError(f"ggml in {folder} does not load: {error}") from error
    library.ggml_log_set(_say_nothing, None)
    return library


def _free(ggml: ctypes.CDLL, buffers: list[int], contexts: list[int], backend: int) -> None:
    for buffer in buffers:
        ggml.ggml_backend_buffer_free(buffer)
    for context in contexts:
        ggml.ggml_free(context)
    ggml.ggml_backend_free(backend)


class Product:
    """y = x @ W^T for one x and several W, which ggml quantizes to one of ``TYPES``."""

    def __init__(self, x: torch.Tensor, weights: list[torch.Tensor], kind: str) -> None:
        ggml = self._ggml = _library()
        self._contexts: list[int] = []
        self._buffers: list[int] = []
        self._backend = ggml.ggml_backend_cpu_init()
        weakref.finalize(self, _free, ggml, self._buffers, self._contexts, self._backend)
        ggml.ggml_backend_cpu_set_n_threads(self._backend, torch.get_num_threads())
        rest = self._context()
        m, k = x.shape
        x_tensor = ggml.ggml_new_tensor_2d(rest, _F32, k, m)
        self._graphs: list[int] = []
        stored = [self._quantized(weight, kind) for weight in weights]
        results = []
        for weight_tensor in stored:
            results.append(ggml.ggml_mul_mat(rest, weight_tensor, x_tensor))
            self._graphs.append(ggml.ggml_new_graph(rest))
            ggml.ggml_build_forward_expand(self._graphs[-1], results[-1])
        self._allocate(rest, ggml.ggml_backend_get_default_buffer_type(self._backend))
        x = x.float().contiguous()
        ggml.ggml_backend_tensor_set(x_tensor, x.data_ptr(), 0, x.nbytes)
        n = weights[0].shape[0]
        self._results = [
            torch.frombuffer(
                (c_float * (m * n)).from_address(ggml.ggml_get_data(y)), dtype=torch.float32
            ).view(m, n)
            for y in results
        ]

    def __call__(self, index: int) -> torch.Tensor:
        index %= len(self._graphs)
        status = self._ggml.ggml_backend_graph_compute(self._backend, self._graphs[index])
        if status != 0:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
        return self._results[index]  # float32 [M, N], ggml's own memory

    def _context(self) -> int:
        """Room for descriptions; tensors get their memory by _allocate."""
        context: int = self._ggml.ggml_init(_InitParams(64 << 20, None, True))
        self._contexts.append(context)
        return context

    def _allocate(self, context: int, buffer_type: int) -> None:
        buffer = self._ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
        if not buffer:
            raise UnavailableError("ggml could not allocate its tensors")
        self._buffers.append(buffer)

    def _quantized(self, weight: torch.Tensor, kind: str) -> int:
        ggml, (n, k) = self._ggml, weight.shape
        size = ggml.ggml_row_size(TYPES[kind], k) * n
        blob = ctypes.create_string_buffer(size)
        values = weight.float().contiguous()
        ggml.ggml_quantize_chunk(TYPES[kind], values.data_ptr(), blob, 0, n, k, None)
        context = self._context()
        tensor: int = ggml.ggml_new_tensor_2d(context, TYPES[kind], k, n)
        self._allocate(context, self._buffer_type())
        ggml.ggml_backend_tensor_set(tensor, blob, 0, size)
        return tensor

    def _buffer_type(self) -> int:
        """The repacking one, where this build has it: it falls back by itself for other shapes."""
        ggml = self._ggml
        device = ggml.ggml_backend_get_device(self._backend)
        registry = ggml.ggml_backend_dev_backend_reg(device)
        address = ggml.ggml_backend_reg_get_proc_address(
            registry, b"ggml_backend_dev_get_extra_bufts"
        )
        if address:
            extra = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(device)
            if extra and extra[0]:
                return int(extra[0])
        default: int = ggml.ggml_backend_get_default_buffer_type(self._backend)
        return default


def ggml_product(x: torch.Tensor, weights: list[torch.Tensor], kind: str) -> Contender:
    """A contender, once it has shown that it computes the product."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        raise UnavailableError("CPU and float32 only")
    if x.shape[-1] % 256:
        raise UnavailableError("K a multiple of 256 only")
    product = Product(x, weights, kind)
    exact = x @ weights[0].float().T
    error = float((product(0) - exact).norm() / exact.norm())
    if not error < 0.2:
        raise UnavailableError(f"ggml computes something else (relative error {error:.2g})")
    return product
