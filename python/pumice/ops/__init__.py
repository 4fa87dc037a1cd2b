"""The operators as functions: checked, documented, traceable by ``torch.compile`` and export."""

from pumice.ops import _library
from pumice.ops.attention import flash_attention, flash_attention_varlen, merge_attention
from pumice.ops.attention_mask import PackedMask, pack_attention_mask
from pumice.ops.gemm import int8_linear, int8_mixed_linear
from pumice.ops.int4_gemm import int4_linear
from pumice.ops.int4_weight import int4_dequantize, int4_pack, int4_unpack
from pumice.ops.paged import cache_append, cache_copy_blocks, paged_attention
from pumice.ops.quantize import int8_quantize
from pumice.ops.sampling import (
    sample,
    sampling_probs,
    speculative_verify,
    speculative_verify_tree,
)
from pumice.ops.sparse import (
    sparse24_compress,
    sparse24_decompress,
    sparse24_gather,
    sparse24_int4_linear,
    sparse24_int8_linear,
    sparse24_linear,
)

_library.register("pumice")

__all__ = [
    "PackedMask",
    "cache_append",
    "cache_copy_blocks",
    "flash_attention",
    "flash_attention_varlen",
    "int4_dequantize",
    "int4_linear",
    "int4_pack",
    "int4_unpack",
    "int8_linear",
    "int8_mixed_linear",
    "int8_quantize",
    "merge_attention",
    "pack_attention_mask",
    "paged_attention",
    "sample",
    "sampling_probs",
    "sparse24_compress",
    "sparse24_decompress",
    "sparse24_gather",
    "sparse24_int4_linear",
    "sparse24_int8_linear",
    "sparse24_linear",
    "speculative_verify",
    "speculative_verify_tree",
]
