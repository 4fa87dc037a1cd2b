"""The memory of a paged KV cache: for each layer one tensor of blocks for keys, one for values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pumice.ops.paged import cache_copy_blocks

if TYPE_CHECKING:
    from pumice.decode.model import PagedModel

__all__ = ["CachePool", "LayerShape"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_BYTES = (torch.float8_e4m3fn, torch.int8)


class LayerShape(NamedTuple):
    """What one token leaves in the cache of one layer: H_kv · (D + D_v) elements."""

    kv_heads: int
    head_dim: int
    value_dim: int


class CachePool:
    """``num_blocks`` blocks of ``block_size`` tokens for every layer of a model.

    One block number stands for the same tokens in all layers, so one
    :class:`~pumice.decode.BlockManager` keeps the books of them all. Memory is not filled: what is
    in a slot before :func:`pumice.ops.cache_append` wrote there is never read.

    Args:
        num_blocks, block_size: as the block manager's.
        layers: for each layer (kv_heads, head_dim, value_dim).
        dtype: of the model's keys and values: float32, float16 or bfloat16.
        cache_dtype: what the pool holds: the same by default, or bytes: ``torch.float8_e4m3fn`` or
            ``torch.int8``, half the memory of 16 bits.
        scales: for a pool of bytes: for each layer (k_scale, v_scale), fp32 [1] or [H_kv], which
            stored bytes are multiplied with. See :func:`pumice.decode.scales.measure_scales`.
        device: where the model is.

    Attributes:
        key_caches, value_caches: for each layer, [num_blocks, block_size, H_kv, D] and [..., D_v].
        k_scale, v_scale: for each layer, fp32 [1] or [H_kv]; None for a pool of floats.

    Raises:
        ValueError, TypeError: sizes below 1, dtypes that no cache holds, scales that do not fit.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        layers: Sequence[tuple[int, int, int]],
        dtype: torch.dtype,
        cache_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        *,
        scales: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        for name, size in (("num_blocks", num_blocks), ("block_size", block_size)):
            if size < 1:
                raise ValueError(f"CachePool: {name} must be at least 1, not {size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.layers = tuple(LayerShape(*layer) for layer in layers)
        if not self.layers or min(min(layer) for layer in self.layers) < 1:
            raise ValueError(
                "CachePool: layers must be one or more (kv_heads, head_dim, value_dim), all at "
                f"least 1, not {list(layers)}"
            )
        self.dtype = dtype
        self.cache_dtype = stored_dtype(dtype, cache_dtype)
        self.device = torch.device(device)
        self.k_scale: list[Tensor] | None = None
        self.v_scale: list[Tensor] | None = None
        self._place_scales(scales)
        shape = (num_blocks, block_size)
        options: Any = {"dtype": self.cache_dtype, "device": self.device}
        # Tensors made in inference mode could never be written to outside of it.
        with torch.inference_mode(False):
            self.key_caches = [
                torch.empty(*shape, heads, dim, **options) for heads, dim, _ in self.layers
            ]
            self.value_caches = [
                torch.empty(*shape, heads, dim, **options) for heads, _, dim in self.layers
            ]

    @classmethod
    def for_model(
        cls,
        model: Any,
        *,
        num_blocks: int,
        block_size: int = 16,
        cache_dtype: torch.dtype | None = None,
        scales: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> CachePool:
        """The pool for a model (see :class:`~pumice.decode.ModelRunner` for which are taken).

        The shapes and the dtype of keys and values are not guessed from names in a configuration:
        one token is run through the model, and what its attention layers hand over is looked at.

        For a pool of bytes ``scales`` are measured on random tokens unless they are given; see
        :func:`pumice.decode.scales.measure_scales`, which also takes tokens of yours.
        """
        paged = _paged(model)
        geometry = paged.geometry
        if scales is None and stored_dtype(geometry.dtype, cache_dtype) in _BYTES:
            from pumice.decode.scales import measure_scales

            scales = measure_scales(paged, cache_dtype)
        return cls(
            num_blocks,
            block_size,
            geometry.layers,
            geometry.dtype,
            cache_dtype,
            geometry.device,
            scales=scales,
        )

    @staticmethod
    def bytes_per_block(
        model: Any, *, block_size: int = 16, cache_dtype: torch.dtype | None = None
    ) -> int:
        """What one block of a pool for this model takes, all layers together."""
        geometry = _paged(model).geometry
        elements = sum(heads * (dim + value_dim) for heads, dim, value_dim in geometry.layers)
        return block_size * elements * stored_dtype(geometry.dtype, cache_dtype).itemsize

    @property
    def nbytes(self) -> int:
        """The memory of all blocks."""
        return sum(cache.nbytes for cache in (*self.key_caches, *self.value_caches))

    @property
    def quantized(self) -> bool:
        return self.cache_dtype in _BYTES

    def scales(self, layer_idx: int) -> tuple[Tensor | None, Tensor | None]:
        """(k_scale, v_scale) of a layer, as the operators take them."""
        if self.k_scale is None or self.v_scale is None:
            return None, None
        return self.k_scale[layer_idx], self.v_scale[layer_idx]

    def copy_blocks(self, pairs: npt.NDArray[np.int64] | Tensor) -> None:
        """Copy blocks (from, to), int64 [n, 2], in all layers: ``Step.copies`` of a forked batch.

        To be called before the step's tokens are written.
        """
        pairs = torch.as_tensor(pairs)
        if not pairs.shape[0]:
            return
        pairs = pairs.to(self.device)
        with torch.no_grad():
            for keys, values in zip(self.key_caches, self.value_caches, strict=True):
                cache_copy_blocks(keys, values, pairs)

    def move_tokens(
        self, source: npt.NDArray[np.int64], destination: npt.NDArray[np.int64]
    ) -> None:
        """Copy the keys and values of slots to other slots, in all layers. The two may overlap:
        all are read before any is written."""
        moved = source != destination
        if not moved.any():
            return
        slots = [torch.from_numpy(s[moved]).to(self.device) for s in (source, destination)]
        with torch.no_grad():
            for cache in (*self.key_caches, *self.value_caches):
                # Bytes are moved as bytes: not everything can be indexed in float8.
                flat = cache.flatten(0, 1)
                flat = flat.view(torch.uint8) if flat.element_size() == 1 else flat
                flat[slots[1]] = flat[slots[0]]

    def fits(self, layers: Sequence[LayerShape], dtype: torch.dtype, device: torch.device) -> bool:
        """Whether a model with these layers can use this pool (or a first part of its layers)."""
        same_device = device.type == self.device.type and (device.index or 0) == (
            self.device.index or 0
        )
        return self.layers[: len(layers)] == tuple(layers) and dtype == self.dtype and same_device

    def __repr__(self) -> str:
        return (
            f"CachePool({self.num_blocks} blocks of {self.block_size} tokens, "
            f"{len(self.layers)} layers, {str(self.cache_dtype)[6:]}, {self.device}, "
            f"{self.nbytes / 2**20:.1f} MiB)"
        )

    def _place_scales(self, scales: Sequence[tuple[Tensor, Tensor]] | None) -> None:
        if not self.quantized:
            if scales is not None:
                raise ValueError(
                    "CachePool: scales are for a pool of float8_e4m3fn or int8, not of "
                    f"{str(self.cache_dtype)[6:]}"
                )
            return
        if scales is None or len(scales) != len(self.layers):
            raise ValueError(
                f"CachePool: a pool of {str(self.cache_dtype)[6:]} needs scales, a pair (k_scale, "
                f"v_scale) for each of {len(self.layers)} layers, not "
                + ("None" if scales is None else f"{len(scales)} of them")
            )
        self.k_scale, self.v_scale = [], []
        for index, (layer, pair) in enumerate(zip(self.layers, scales, strict=True)):
            for name, scale, column in zip(
                ("k_scale", "v_scale"), pair, (self.k_scale, self.v_scale), strict=True
            ):
                if scale.dtype != torch.float32 or scale.shape not in ((1,), (layer.kv_heads,)):
                    raise ValueError(
                        f"CachePool: {name} of layer {index} must be float32 [1] or "
                        f"[{layer.kv_heads}], not {str(scale.dtype)[6:]} {list(scale.shape)}"
                    )
                column.append(scale.to(self.device))


def stored_dtype(dtype: torch.dtype, cache_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a pool for a model whose keys are of ``dtype``."""
    if dtype not in _FLOATS:
        raise TypeError(
            "CachePool: the model's keys and values must be float32, float16 or bfloat16, not "
            f"{str(dtype)[6:]}"
        )
    if cache_dtype not in (None, dtype, *_BYTES):
        raise TypeError(
            f"CachePool: cache_dtype must be {str(dtype)[6:]}, that of the model's keys, or "
            f"float8_e4m3fn or int8, not {str(cache_dtype).removeprefix('torch.')}"
        )
    return cache_dtype or dtype


def _paged(model: Any) -> PagedModel:
    from pumice.decode.model import PagedModel

    return model if isinstance(model, PagedModel) else PagedModel(model)
