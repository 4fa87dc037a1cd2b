"""The operators as functions: checked, documented, traceable by ``torch.compile`` and export."""

from pumice.ops import _library
from pumice.ops.gemm import int8_linear, int8_mixed_linear
from pumice.ops.int4 import int4_dequantize, int4_linear, int4_pack, int4_unpack
from pumice.ops.quantize import int8_quantize

_library.register("pumice")

__all__ = [
    "int4_dequantize",
    "int4_linear",
    "int4_pack",
    "int4_unpack",
    "int8_linear",
    "int8_mixed_linear",
    "int8_quantize",
]
