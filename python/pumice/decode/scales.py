"""Scales for caches of bytes, from the keys and values that a model makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pumice.decode.batch import PagedBatch
from pumice.decode.block_manager import BlockManager
from pumice.decode.model import PagedModel
from pumice.decode.pool import CachePool

__all__ = ["measure_scales"]

_LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
_BLOCK = 16


def measure_scales(
    model: PagedModel | torch.nn.Module,
    cache_dtype: torch.dtype | None,
    tokens: Sequence[int] | None = None,
    *,
    margin: float = 1.25,
) -> list[tuple[Tensor, Tensor]]:
    """(k_scale, v_scale), fp32 [H_kv], of each layer, for :class:`~pumice.decode.CachePool`.

    The largest magnitude that a head of the model writes for ``tokens``, times ``margin``, becomes
    the largest number of the cache: scale = margin · absmax / 448 (float8_e4m3fn) or / 127 (int8).
    What is larger later is cut off there. float8 loses nothing by a wide margin (down to its
    subnormal numbers); int8 loses precision by it.

    Args:
        cache_dtype: ``torch.float8_e4m3fn`` or ``torch.int8``.
        tokens: a text that is like those to come; by default 256 tokens (or as many as the model
            takes) drawn at random, always the same ones. What makes keys large is channels more
            than tokens.

    Raises:
        TypeError: another cache_dtype. ValueError: no tokens; keys that are not finite.
    """
    if cache_dtype not in _LARGEST:
        raise TypeError(
            "measure_scales: cache_dtype must be float8_e4m3fn or int8, not "
            f"{str(cache_dtype).removeprefix('torch.')}"
        )
    paged = model if isinstance(model, PagedModel) else PagedModel(model)
    if tokens is None:
        generator = torch.Generator().manual_seed(0)
        longest = getattr(getattr(paged.model, "config", None), "max_position_embeddings", 256)
        size = (min(256, longest),)
        tokens = torch.randint(paged.geometry.vocab_size, size, generator=generator).tolist()
    if not len(tokens):
        raise ValueError("measure_scales: tokens must be one or more")
    pool = CachePool.for_model(
        paged, num_blocks=-(-len(tokens) // _BLOCK), block_size=_BLOCK, cache_dtype=None
    )
    manager = BlockManager(pool.num_blocks, _BLOCK, watermark=0.0)
    sequence = manager.allocate(num_tokens=len(tokens))
    step = manager.view([sequence.id], [len(tokens)])
    batch = _Measuring.from_step(pool, step, [tokens])
    paged.forward(batch, torch.zeros(1, dtype=torch.int64, device=pool.device))
    scales = []
    for index, pair in enumerate(batch.absmax):
        if not all(bool(absmax.isfinite().all()) for absmax in pair):
            raise ValueError(f"measure_scales: keys or values of layer {index} are not finite")
        # A head that is always zero stays so, whatever its scale.
        key, value = (
            (absmax * margin / _LARGEST[cache_dtype]).clamp(min=torch.finfo(torch.float32).tiny)
            for absmax in pair
        )
        scales.append((key, value))
    return scales


@dataclass
class _Measuring(PagedBatch):
    """A batch that notes the largest magnitude of each head's keys and values, layer by layer."""

    absmax: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def append(self, layer_idx: int, key: Tensor, value: Tensor) -> None:
        super().append(layer_idx, key, value)
        self.absmax.append((key.abs().amax((0, 2)).float(), value.abs().amax((0, 2)).float()))
