"""Attention beside its peers: ``python -m bench attention``.

Operations of a case: 4·D for every query and key that see each other (two products), and 2.5 times
as many again for the backward pass, which makes five; as FlashAttention's papers count. Floor:
query, key, value and out moved once over the memory bandwidth, or the operations at the peak,
whichever is longer. The peak is the data sheet's for 16 bit on a GPU, and on a CPU the rate of
torch's own matrix product at that dtype, measured in the run.

"torch" is ``scaled_dot_product_attention`` with whatever kernel torch picks; the others force one.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.cases import BASELINE, Bench, Peer, UnavailableError
from bench.machine import Machine, matmul_peak
from bench.timing import Contender, copies_beyond_cache

# Bytes of the scores that torch's math kernel may make: for memory, and on a CPU for time.
MOST_SCORES = {"cpu": 1 << 28, "cuda": 8 << 30}


@dataclass(frozen=True)
class Attention:
    """B sequences of S_q queries and S_k keys, H heads on H_kv of key and value."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    causal: bool = False
    window: int = -1  # keys seen before a query's position; -1: all
    backward: bool = False

    def __str__(self) -> str:
        heads = f"H={self.heads}" + (f"/{self.kv_heads}" if self.kv_heads != self.heads else "")
        lengths = f"S={self.keys}" if self.queries == self.keys else f"S={self.queries}/{self.keys}"
        marks = "causal " * self.causal + f"window {self.window} " * (self.window >= 0)
        direction = "forward+backward" if self.backward else "forward"
        return f"B={self.batch} {heads} {lengths} D={self.dim} {marks}{direction}"

    @property
    def visible(self) -> int:
        """Pairs of a query and a key that it sees."""
        position = torch.arange(self.queries) + self.keys - self.queries
        end = position + 1 if self.causal else torch.full_like(position, self.keys)
        begin = position - self.window if self.window >= 0 else torch.zeros_like(position)
        return int((end - begin.clamp(min=0)).clamp(min=0).sum())

    @property
    def operations(self) -> int:
        forward = 4 * self.batch * self.heads * self.dim * self.visible
        return forward * 7 // 2 if self.backward else forward

    def mask(self) -> torch.Tensor | None:
        """What torch must be given where is_causal does not say it: bool [S_q, S_k]."""
        if self.window < 0 and (not self.causal or self.queries == self.keys):
            return None
        position = torch.arange(self.queries)[:, None] + self.keys - self.queries
        key = torch.arange(self.keys)
        seen = key <= position if self.causal else torch.ones(1, self.keys, dtype=torch.bool)
        return (seen & (key >= position - self.window)) if self.window >= 0 else seen


@dataclass
class Inputs:
    """Rotated copies of query, key, value and the gradient of out, all [B, S, H, D]."""

    case: Attention
    operands: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    grads: list[torch.Tensor]
    mask: torch.Tensor | None

    @property
    def first(self) -> torch.Tensor:
        return self.operands[0][0]


def make_inputs(
    case: Attention, machine: Machine, device: torch.device, dtype: torch.dtype
) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    query = (case.batch, case.queries, case.heads, case.dim)
    key = (case.batch, case.keys, case.kv_heads, case.dim)
    moved = _elements(case) * dtype.itemsize
    copies = min(copies_beyond_cache(moved, machine.cache_bytes), 64)

    def make(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    operands = [(make(query), make(key), make(key)) for _ in range(copies)]
    grads = [make(query) for _ in range(copies)] if case.backward else []
    for tensor in (t for each in operands for t in each if case.backward):
        tensor.requires_grad_()
    mask = case.mask()
    return Inputs(case, operands, grads, mask if mask is None else mask.to(device))


def contender(inputs: Inputs, forward: Callable[..., torch.Tensor]) -> Contender:
    """Forward, or forward and backward, of a function of [B, S, H, D]."""

    def call(i: int) -> object:
        i %= len(inputs.operands)
        out = forward(*inputs.operands[i])
        if not inputs.case.backward:
            return out
        return torch.autograd.grad(out, inputs.operands[i], inputs.grads[i])

    return call


def heads_first(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def torch_sdpa(inputs: Inputs, backend: SDPBackend | None = None) -> Contender:
    """torch's function on transposed views, all kernels allowed or one only."""
    case = inputs.case

    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
            out = functional.scaled_dot_product_attention(
                *heads_first(query, key, value),
                attn_mask=inputs.mask,
                is_causal=case.causal and inputs.mask is None,
                enable_gqa=case.kv_heads != case.heads,
            )
        return out.transpose(1, 2)

    if backend is not None:
        _try_once(contender(inputs, forward))
    return contender(inputs, forward)


def torch_math(inputs: Inputs) -> Contender:
    case = inputs.case
    scores = 4 * case.batch * case.heads * case.queries * case.keys
    if scores > MOST_SCORES[inputs.first.device.type]:
        raise UnavailableError(f"its scores alone take {scores / (1 << 20):,.0f} MB")
    return torch_sdpa(inputs, SDPBackend.MATH)


def torch_on_cuda(inputs: Inputs, backend: SDPBackend) -> Contender:
    if inputs.first.device.type != "cuda":
        raise UnavailableError("CUDA only")
    return torch_sdpa(inputs, backend)


def torch_flex(inputs: Inputs) -> Contender:
    """FlexAttention, compiled, with a block mask made beforehand."""
    if inputs.first.device.type != "cuda":
        raise UnavailableError("CUDA only: on a CPU it takes a C++ compilation for every case")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case = inputs.case
    shift = case.keys - case.queries

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        after = j <= i + shift if case.causal else j >= 0
        return after & (j >= i + shift - case.window) if case.window >= 0 else after

    block_mask = (
        create_block_mask(seen, None, None, case.queries, case.keys, inputs.first.device)
        if case.causal or case.window >= 0
        else None
    )
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = compiled(
            *heads_first(query, key, value),
            block_mask=block_mask,
            enable_gqa=case.kv_heads != case.heads,
        )
        return out.transpose(1, 2)

    _try_once(contender(inputs, forward))
    return contender(inputs, forward)


def flash_attn(inputs: Inputs) -> Contender:
    """The package flash-attn."""
    if inputs.first.device.type != "cuda" or inputs.first.dtype.itemsize != 2:
        raise UnavailableError("CUDA and 16 bit only")
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise UnavailableError("not installed") from error
    case = inputs.case

    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = flash_attn_func(
            query, key, value, causal=case.causal, window_size=(case.window, -1)
        )
        return out

    _try_once(contender(inputs, forward))
    return contender(inputs, forward)


def pumice_flash(inputs: Inputs) -> Contender:
    from pumice.ops import flash_attention

    case = inputs.case
    return contender(
        inputs,
        lambda query, key, value: flash_attention(
            query, key, value, causal=case.causal, window=(case.window, -1)
        ),
    )


def _try_once(call: Contender) -> None:
    """Raise UnavailableError, with what torch says of the reason, where a peer cannot run."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            call(0)
        except Exception as error:  # a compiler's, a library's, torch's
            reasons = [str(warning.message).split(" (Triggered")[0] for warning in said]
            lines = str(error).splitlines() or [type(error).__name__]
            raise UnavailableError(" ".join([lines[0], *reasons[1:]])) from error


PEERS: dict[str, Peer[Inputs]] = {
    BASELINE: torch_sdpa,
    "torch flash": lambda inputs: torch_sdpa(inputs, SDPBackend.FLASH_ATTENTION),
    "torch cuDNN": lambda inputs: torch_on_cuda(inputs, SDPBackend.CUDNN_ATTENTION),
    "torch mem-efficient": lambda inputs: torch_on_cuda(inputs, SDPBackend.EFFICIENT_ATTENTION),
    "torch math": torch_math,
    "torch flex": torch_flex,
    "flash-attn": flash_attn,
    "pumice": pumice_flash,
}


def _elements(case: Attention) -> int:
    """Of query, key, value and out."""
    return 2 * case.batch * case.dim * (case.queries * case.heads + case.keys * case.kv_heads)


def floor_us(case: Attention, machine: Machine, dtype: torch.dtype) -> float:
    peak = machine.peak_16bit if dtype.itemsize == 2 else None
    if machine.device == "cpu":
        peak = matmul_peak(torch.device("cpu"), dtype)
    by_operations = case.operations / peak if peak else 0.0
    # Backward reads all four and the gradient of out again, and writes three gradients.
    moved = _elements(case) * dtype.itemsize * (3 if case.backward else 1)
    return max(moved / machine.bandwidth, by_operations) * 1e6


BENCH = Bench(
    "attention",
    make_inputs,
    PEERS,
    floor_us,
    kernel_names=("flash_", "attention_", "merge_attention"),
    rates=True,
)


def cpu_cases() -> list[Attention]:
    """Eight heads; the windows at 4096 show whether time is that of the visible area."""
    square = [Attention(1, 8, 8, 2048, 2048, 128, causal=causal) for causal in (True, False)]
    windows = [
        Attention(1, 8, 8, 4096, 4096, 128, causal=True, window=window)
        for window in (-1, 1024, 256)
    ]
    decode = [Attention(1, 8, kv_heads, 1, 4096, 128) for kv_heads in (8, 2)]
    training = [Attention(1, 8, 8, 2048, 2048, 128, causal=True, backward=True)]
    return [*square, *windows, *decode, *training]


def cuda_cases() -> list[Attention]:
    """The shapes of FlashAttention's papers (B·S = 16k, H·D = 2048), then windows and decoding."""
    paper = [
        Attention(16384 // length, 2048 // dim, 2048 // dim, length, length, dim, causal=causal)
        for dim in (64, 128, 256)
        for causal in (False, True)
        for length in (512, 1024, 2048, 4096, 8192, 16384)
    ]
    windows = [
        Attention(1, 16, 16, 16384, 16384, 128, causal=True, window=window)
        for window in (4096, 1024, 256)
    ]
    decode = [
        Attention(batch, 32, 8, 1, keys, 128) for batch in (1, 16) for keys in (1024, 4096, 16384)
    ]
    training = [
        Attention(
            16384 // length, 2048 // dim, 2048 // dim, length, length, dim, True, backward=True
        )
        for dim in (64, 128)
        for length in (2048, 8192)
    ]
    return [*paper, *windows, *decode, *training]


CASES = {"cpu": cpu_cases, "cuda": cuda_cases}
