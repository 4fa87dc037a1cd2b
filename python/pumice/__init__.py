"""Pumice: kernels that make language models smaller and faster, and the methods that feed them."""

from pumice import nn, ops, prune, quantize
from pumice.checkpoint import load, save
from pumice.compress import compress
from pumice.decode.generate import generate
from pumice.doctor import doctor
from pumice.flash_attn import (
    flash_attn_func,
    flash_attn_varlen_func,
    scaled_dot_product_attention,
)
from pumice.flash_attn_kvcache import flash_attn_with_kvcache, reshape_and_cache_flash
from pumice.prune import Magnitude, PruneAndTune, SparseGPT, Wanda
from pumice.quantize import AWQ, GPTQ, RTN, AWQScaling, Int8, LLMInt8
from pumice.report import Report, report

__version__ = "0.1.0"

__all__ = [
    "AWQ",
    "GPTQ",
    "RTN",
    "AWQScaling",
    "Int8",
    "LLMInt8",
    "Magnitude",
    "PruneAndTune",
    "Report",
    "SparseGPT",
    "Wanda",
    "__version__",
    "compress",
    "doctor",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "generate",
    "load",
    "nn",
    "ops",
    "prune",
    "quantize",
    "report",
    "reshape_and_cache_flash",
    "save",
    "scaled_dot_product_attention",
]
