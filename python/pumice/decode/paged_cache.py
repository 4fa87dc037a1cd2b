"""A paged cache for transformers' own ``model.generate``."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pumice.decode.batch import PagedBatch
from pumice.decode.block_manager import BlockManager, Stats, Step
from pumice.decode.model import PagedModel
from pumice.decode.pool import CachePool

try:
    import transformers
    from transformers.cache_utils import Cache, CacheLayerMixin
except ImportError as error:
    raise ImportError(
        "PagedCache is a cache of transformers >= 4.57: pip install 'pumice[hf]'"
    ) from error

__all__ = ["PagedCache"]

_POSITIVE_CROP_KEEPS = int(transformers.__version__.split(".")[0]) < 5


class PagedCache(Cache):  # type: ignore[misc]
    """A cache of transformers whose keys and values lie in blocks of a pool::

        cache = PagedCache(model, num_blocks=1000)
        model.generate(**inputs, past_key_values=cache)
        cache.reset()                              # for other prompts; else it goes on from here

    For sampling, several returned sequences, beams (which share blocks and copy them when they
    part), prompts padded on either side, assisted generation (``crop``).

    With ``attn_implementation="pumice"`` attention reads the blocks where they lie, and padding
    takes no memory: sequences are as long as they are. Under any other implementation keys and
    values are gathered into [B, H_kv, S, D] for every layer and step, padding included, which is
    correct and costs what ``torch.cat`` costs transformers' DynamicCache.

    Args:
        model: the model that will use it, of transformers.
        num_blocks, block_size, cache_dtype, scales: of the pool, see
            :class:`~pumice.decode.CachePool`. Sequences of n tokens take ceil(n / block_size)
            blocks each, in all layers together.
        pool: one that is there, and that nothing else uses, instead.

    Attributes:
        pool: the memory. manager: the block manager, once there are tokens.

    Raises:
        TypeError, NotImplementedError: a model that is not of transformers, or of another kind.
        OutOfBlocksError: from the forward pass that needs more blocks than there are; the cache is
            as before it.
        ValueError: another batch size than before; with "pumice", padding that differs from that
            of earlier calls, since what was left out cannot be brought back.
        NotImplementedError: with "pumice", masks that are not causal with padding.
    """

    def __init__(
        self,
        model: nn.Module,
        num_blocks: int | None = None,
        block_size: int = 16,
        *,
        cache_dtype: torch.dtype | None = None,
        scales: list[tuple[Tensor, Tensor]] | None = None,
        pool: CachePool | None = None,
    ) -> None:
        paged = PagedModel(model)
        if not paged.is_transformers:
            raise TypeError(
                f"PagedCache: {type(model).__name__} is no model of transformers; plain torch "
                "models run over a pool by ModelRunner"
            )
        geometry = paged.geometry
        if (pool is None) == (num_blocks is None):
            raise ValueError("PagedCache: give either num_blocks, for a new pool, or pool")
        if pool is None:
            assert num_blocks is not None
            pool = CachePool.for_model(
                paged,
                num_blocks=num_blocks,
                block_size=block_size,
                cache_dtype=cache_dtype,
                scales=scales,
            )
        elif not pool.fits(geometry.layers, geometry.dtype, geometry.device):
            raise ValueError(f"PagedCache: {pool} does not fit {type(model).__name__}")
        super().__init__(layers=[_Layer(self) for _ in geometry.layers])
        self.pool = pool
        self._config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr,operator]
        self._window_left = geometry.window_left
        self.manager: BlockManager | None = None
        self._forget()

    def _forget(self) -> None:
        self._ids: npt.NDArray[np.int64] | None = None
        self._real: npt.NDArray[np.bool_] | None = None  # [B, columns]: False where padding was
        self._batch: PagedBatch | None = None  # of the forward pass that goes on
        self._rows: Tensor | None = None  # its tokens that are no padding; None: all
        self._handed: Tensor | None = None  # what attention has yet to read
        self._pages = False  # whether attention reads the blocks

    # What a model calls.

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take a layer's new keys and values [B, H_kv, S_new, D]; what its attention is to read.

        For "pumice" these are the new ones, marked: the attention function finds the cache by them
        and calls :meth:`attend`. For others, all there are.
        """
        if self._handed is not None and layer_idx > 0:  # else a pass before this one was broken off
            raise RuntimeError(
                f"PagedCache: a layer's attention did not read the cache that it was given before "
                f"layer {layer_idx}: its keys were changed after the update, or its implementation "
                "is another than the model's configuration says"
            )
        pages = self._config._attn_implementation == "pumice"
        if self._ids is not None and pages != self._pages:
            raise ValueError(
                "PagedCache: the model's attention implementation has changed to or from 'pumice' "
                "while there are tokens; call reset() first"
            )
        self._pages = pages
        if pages:
            marked = key_states.view(key_states.shape)
            marked.pumice_pages = self  # type: ignore[attr-defined]
            self._handed = marked
            return marked, value_states
        if layer_idx == 0:
            self._begin(key_states.shape[0], key_states.shape[2], None, reclaim=False)
        batch = self._batch
        assert batch is not None
        batch.append(layer_idx, _packed(key_states), _packed(value_states))
        return self._gather(batch, layer_idx, key_states.dtype)

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        softmax_scale: float | None,
        window: tuple[int, int],
        sinks: Tensor | None,
        softcap: float,
    ) -> Tensor:
        """A layer's attention, called by the attention function: [B, S_new, H, D_v].

        Args:
            query: [B, H, S_new, D]. key, value: [B, H_kv, S_new, …].
            mask: None, or bool [B, S]: False where padding is.
        """
        self._handed = None
        if layer_idx == 0:
            self._begin(key.shape[0], key.shape[2], mask, reclaim=True)
        batch, rows = self._batch, self._rows
        if batch is None:  # nothing but padding
            return value.new_zeros(*query.shape[:3], value.shape[-1]).transpose(1, 2)
        packed = [_packed(tensor) for tensor in (query, key, value)]
        if rows is not None:
            packed = [tensor[rows] for tensor in packed]
        out = batch.attend(
            layer_idx, *packed,
            softmax_scale=softmax_scale, window=window, sinks=sinks, softcap=softcap,
        )  # fmt: skip
        if rows is not None:  # what padding attends to, nobody sees
            out = out.new_zeros(key.shape[0] * key.shape[2], *out.shape[1:]).index_copy(
                0, rows, out
            )
        return out.view(key.shape[0], key.shape[2], *out.shape[1:])

    def get_seq_length(self, layer_idx: int = 0, *args: Any) -> int:
        """Tokens a sequence, padding included."""
        return 0 if self._real is None else self._real.shape[1]

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Keys that the next forward pass sees, and the position of the first."""
        if isinstance(query_length, Tensor):  # transformers 4 gives the positions of the queries
            query_length = query_length.shape[0]
        return self.get_seq_length() + query_length, 0

    # What generation calls.

    def reset(self) -> None:
        """Forget all sequences; their blocks are free."""
        if self.manager is not None and self._ids is not None:
            self.manager.free(self._ids)
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes a copy of sequence ``beam_idx[i]``, of which blocks are shared."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices`` (or where it is True), in that order."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self._select(indices.cpu().numpy())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times, one after the other."""
        if self._ids is not None:
            self._select(np.arange(len(self._ids)).repeat(repeats))

    def _select(self, indices: npt.NDArray[np.int64]) -> None:
        if self.manager is None or self._ids is None or self._real is None:
            return
        before = self._ids
        self._ids = self.manager.fork(before[indices])
        self.manager.free(before)
        self._real = self._real[indices]

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last ``-tokens_to_remove`` tokens back, as after rejected drafts.

        A positive number is the length to keep, as in transformers 4; in 5 it is an error.
        """
        if tokens_to_remove > 0 and not _POSITIVE_CROP_KEEPS:
            raise ValueError(
                f"PagedCache.crop: tokens_to_remove must be 0 or negative, not {tokens_to_remove}"
            )
        if self.manager is None or self._ids is None or self._real is None:
            return
        length = self.get_seq_length()
        keep = tokens_to_remove if tokens_to_remove > 0 else max(length + tokens_to_remove, 0)
        if keep < length:
            self.manager.truncate(self._ids, self._real[:, :keep].sum(1))
            self._real = self._real[:, :keep]

    def activate_past_recording(self) -> None:
        """Generation says that it will crop: keep blocks that leave the model's window."""
        self._window_left = None

    @property
    def batch_size(self) -> int:
        """Sequences; -1 before the first tokens."""
        return -1 if self._ids is None else len(self._ids)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no sequence has a limit of its own."""
        return -1

    def stats(self) -> Stats | None:
        """The account of the pool; None before the first tokens."""
        return None if self.manager is None else self.manager.stats()

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        raise TypeError(
            "PagedCache: a pool is not copied; batch_repeat_interleave shares what is there among "
            "more sequences, without copying it"
        )

    def __repr__(self) -> str:
        return f"PagedCache({self.pool}, {self.batch_size} × {self.get_seq_length()} tokens)"

    # One forward pass.

    def _begin(self, batch: int, new: int, mask: Tensor | None, *, reclaim: bool) -> None:
        """Find room for a forward pass's tokens: blocks, slots, and which are padding."""
        if self._ids is not None and batch != len(self._ids):
            raise ValueError(
                f"PagedCache: it holds {len(self._ids)} sequences, but a batch of {batch} came; "
                "call reset() before another batch"
            )
        past = np.ones((batch, 0), np.bool_) if self._real is None else self._real
        length = past.shape[1]
        if mask is None:
            seen = np.ones((batch, length + new), np.bool_)
        else:
            seen = mask.expand(batch, -1).cpu().numpy()
        if seen.shape[1] < length + new or (seen[:, :length] != past).any():
            raise ValueError(
                f"PagedCache: the attention mask covers {seen.shape[1]} tokens with other padding "
                f"than that of the {length} that came before; with attn_implementation='pumice' "
                "padding is left out for good (reset() begins anew)"
            )
        real = seen[:, length : length + new]
        manager = self._manager(reclaim)
        if self._ids is None:
            self._ids = np.array(
                [manager.allocate(num_tokens=0).id for _ in range(batch)], dtype=np.int64
            )
        counts = real.sum(1)
        step: Step = manager.append(self._ids, counts=counts)
        self._real = np.concatenate([past, real], 1)
        unused = np.zeros(int(counts.sum()), np.int64)
        self._batch = self._rows = None
        if len(unused):
            self._batch = PagedBatch.from_arrays(self.pool, step, counts, unused, unused)
        if not real.all():
            self._rows = torch.from_numpy(real.ravel().nonzero()[0]).to(self.pool.device)

    def _manager(self, reclaim: bool) -> BlockManager:
        """The books; what is gathered must be whole, so blocks are reclaimed for pages only."""
        window_left = self._window_left if reclaim else None
        fresh = self.manager is None or (
            self._ids is None and self.manager.window_left != window_left
        )
        if fresh:
            self.manager = BlockManager(
                self.pool.num_blocks,
                self.pool.block_size,
                prefix_caching=False,
                watermark=0.0,
                window_left=window_left,
            )
        assert self.manager is not None
        return self.manager

    def _gather(
        self, batch: PagedBatch, layer_idx: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, [B, H_kv, S, …], where no sequence has left out any."""
        table = batch.block_table.long()
        length, pool = self.get_seq_length(), self.pool
        gathered = []
        for cache, scale in zip(
            (pool.key_caches[layer_idx], pool.value_caches[layer_idx]),
            pool.scales(layer_idx),
            strict=True,
        ):
            if scale is None:
                rows = cache[table].flatten(1, 2)[:, :length]
            else:  # by way of uint8, for float8 cannot be indexed everywhere
                rows = cache.view(torch.uint8)[table].flatten(1, 2)[:, :length].view(cache.dtype)
                rows = (rows.float() * scale[:, None]).to(dtype)
            gathered.append(rows.transpose(1, 2))
        return gathered[0], gathered[1]


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """What transformers asks of single layers. Everything is kept by the cache as a whole."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: PagedCache) -> None:
        super().__init__()
        self.is_initialized = True
        self._cache = weakref.proxy(cache)  # a cycle would keep the pool until it is found

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the pool is there."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("PagedCache: layers are updated by the cache, cache.update")

    def get_seq_length(self, *args: Any) -> int:
        length: int = self._cache.get_seq_length()
        return length

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        sizes: tuple[int, int] = self._cache.get_mask_sizes(query_length)
        return sizes

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


def _packed(states: Tensor) -> Tensor:
    """[B, H, S, D] → [B · S, H, D]"""
    return states.transpose(1, 2).flatten(0, 1)
