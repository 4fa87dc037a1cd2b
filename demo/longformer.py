"""Longformer's attention, a window and global tokens, in one operator.

The model of ``python -m demo.longformer`` is transformers' own with the published configuration of
longformer-base-4096 and random weights (there is nothing to download). Its self-attention, which
cuts the sequence into overlapping chunks and multiplies them by plain torch, is the reference; ours
reads the same projections. Both run the same tokens; the hidden states must agree, and the time of
either is printed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import LongformerConfig, LongformerModel

from pumice import _console
from pumice.ops import flash_attention

# https://huggingface.co/allenai/longformer-base-4096/blob/main/config.json
PUBLISHED = {
    "attention_window": 512,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 4098,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "type_vocab_size": 1,
    "vocab_size": 50265,
}
TOLERANCE = 1e-4  # of hidden states of variance 1, after all layers in float32


class WindowAttention(nn.Module):
    """Takes the place of a LongformerSelfAttention, with its weights.

    Local tokens see a window on either side and the global tokens. Global tokens see everything,
    through projections of their own (section 3.1 of the paper, "Linear Projections for Global
    Attention"): a second call, on their few queries.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.source = source

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        is_index_masked: Tensor,
        is_index_global_attn: Tensor,
        is_global_attn: bool,
        **_: object,
    ) -> tuple[Tensor]:
        layer, side = self.source, self.source.one_sided_attn_window_size
        mask = ~is_index_masked[:, None, None, :] if is_index_masked.any() else None
        out = flash_attention(
            self.heads(layer.query, hidden_states),
            self.heads(layer.key, hidden_states),
            self.heads(layer.value, hidden_states),
            window=(side, side),
            global_tokens=positions(is_index_global_attn),
            mask=mask,
        )
        if is_global_attn:
            index = positions(is_index_global_attn)
            rows = index.clamp(min=0)[:, :, None].expand(-1, -1, hidden_states.shape[-1])
            seen_by_all = flash_attention(
                self.heads(layer.query_global, hidden_states.gather(1, rows)),
                self.heads(layer.key_global, hidden_states),
                self.heads(layer.value_global, hidden_states),
                mask=mask,
            )
            out[is_index_global_attn] = seen_by_all[index >= 0]
        return (out.flatten(2),)

    def heads(self, projection: nn.Module, x: Tensor) -> Tensor:
        return projection(x).unflatten(-1, (self.source.num_heads, -1))


def positions(chosen: Tensor) -> Tensor:
    """bool [B, S] as int32 [B, G]: where it holds, padded by -1."""
    count = int(chosen.sum(-1).max())
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)[:, :count]
    return torch.where(chosen.gather(1, order), order, -1).int()


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    config = LongformerConfig(**{**PUBLISHED, "num_hidden_layers": options.layers})
    torch.manual_seed(0)
    model = LongformerModel(config, add_pooling_layer=False).eval()
    attentions = [layer.attention for layer in model.encoder.layer]
    with torch.no_grad():
        for attention in attentions:  # weights of 0.02 give flat softmaxes, which hide mistakes
            for projection in ("query", "key", "query_global", "key_global"):
                getattr(attention.self, projection).weight.mul_(5.0)
    ids = torch.randint(5, config.vocab_size, (1, options.tokens))
    chosen = torch.zeros_like(ids)
    chosen[:, : options.global_tokens] = 1  # the question, in the paper's question answering

    theirs, their_times = run(model, ids, chosen)
    for attention in attentions:
        attention.self = WindowAttention(attention.self)
    ours, our_times = run(model, ids, chosen)

    difference = (ours - theirs).abs().max().item()
    console = _console.output()
    console.print(
        f"longformer-base-4096, random weights, {options.layers} layers, {options.tokens} tokens, "
        f"{options.global_tokens} of them global, window 256 on either side, float32, "
        f"{torch.get_num_threads()} threads"
    )
    for name, (total, attention) in (("transformers", their_times), ("pumice", our_times)):
        console.print(f"{name:>13}: {total:6.2f} s, of which attention {attention:6.2f} s")
    holds = difference <= TOLERANCE  # NaN is a no
    console.print(
        f"{'yes' if holds else 'NO '}  the same hidden states: largest difference {difference:.1e} "
        f"(at most {TOLERANCE:.0e})"
    )
    return 0 if holds else 1


@torch.no_grad()
def run(model: nn.Module, ids: Tensor, chosen: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """The last hidden states; seconds in all, and in the self-attention modules."""
    with _timed([layer.attention.self for layer in model.encoder.layer]) as spent:
        start = time.perf_counter()
        output = model(ids, global_attention_mask=chosen).last_hidden_state
        total = time.perf_counter() - start
    return output, (total, sum(spent))


@contextmanager
def _timed(modules: Sequence[nn.Module]) -> Iterator[list[float]]:
    """Collects the seconds of every call of the modules."""
    spent: list[float] = []
    started: list[float] = []
    handles = []
    for module in modules:
        handles.append(
            module.register_forward_pre_hook(lambda *_: started.append(time.perf_counter()))
        )
        handles.append(
            module.register_forward_hook(
                lambda *_: spent.append(time.perf_counter() - started.pop())
            )
        )
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo.longformer", description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="default: %(default)s")
    parser.add_argument("--global-tokens", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's choice")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
