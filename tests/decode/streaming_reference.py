"""StreamingLLM as the paper has it: keys cached unrotated, turned by their place in the cache."""

from __future__ import annotations

import torch
from transformers import AttentionInterface

from pumice.integrations.attention_paged import attention_implementation


class PaperStream:
    """One token at a time through a model, in plain torch, attention in float64.

    The model is told position 0, so queries and keys come unrotated. Of each layer the keys and
    values of the first ``sinks`` tokens and the last ``window`` (the query's own included) are
    kept in lists, and at every step all of them are turned by their index in the list, by which
    windows of layers count too. ``inv_freq``: of all layers, or a list of each one's.
    """

    def __init__(self, model, sinks, window, *, inv_freq, interleaved=False):
        self.model = model
        self.sinks, self.window = sinks, window
        self.inv_freq = inv_freq
        self.interleaved = interleaved
        self.caches: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        AttentionInterface.register("paper_stream", self.attention)

    def step(self, token):
        with_config = [m for m in self.model.modules() if hasattr(m, "config")]
        with attention_implementation(with_config, "paper_stream"), torch.no_grad():
            return self.model(
                input_ids=torch.tensor([[token]]),
                position_ids=torch.zeros(1, 1, dtype=torch.int64),
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),
                use_cache=False,
            ).logits[0, 0]

    def turned(self, states, positions, layer):
        """states [n, H, D]"""
        inv_freq = self.inv_freq[layer] if isinstance(self.inv_freq, list) else self.inv_freq
        angles = positions.double()[:, None, None] * inv_freq.double()
        size = 2 * len(inv_freq)
        turned, rest = states[..., :size], states[..., size:]
        if self.interleaved:
            pairs = torch.view_as_complex(turned.unflatten(-1, (-1, 2)).contiguous())
            turned = torch.view_as_real(pairs * torch.exp(1j * angles)).flatten(-2)
        else:
            pairs = torch.complex(*turned.chunk(2, -1)) * torch.exp(1j * angles)
            turned = torch.cat([pairs.real, pairs.imag], -1)
        return torch.cat([turned, rest], -1)

    def attention(self, module, query, key, value, mask, scaling=None, softcap=None, **kwargs):
        dtype = query.dtype
        query, key, value = (states.double() for states in (query, key, value))
        cache = self.caches.setdefault(module.layer_idx, [])
        cache.append((key[0, :, 0], value[0, :, 0]))
        if len(cache) > self.sinks + self.window:
            del cache[self.sinks]
        positions = torch.arange(len(cache))
        keys, values = (torch.stack(column) for column in zip(*cache, strict=True))
        keys = self.turned(keys, positions, module.layer_idx)
        query = self.turned(query[0].transpose(0, 1), positions[-1:], module.layer_idx)[0]
        groups = query.shape[0] // keys.shape[1]
        keys, values = (t.repeat_interleave(groups, 1) for t in (keys, values))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = torch.einsum("hd,nhd->hn", query, keys) * scale
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        if kwargs.get("sliding_window") is not None:
            hidden = positions[-1] - positions >= kwargs["sliding_window"]
            scores = scores.masked_fill(hidden, -torch.inf)
        if kwargs.get("s_aux") is not None:  # learned sinks: a term of the sum without a value
            scores = torch.cat([scores, kwargs["s_aux"].to(scores)[:, None]], 1)
            values = torch.cat([values, torch.zeros_like(values[:1])])
        out = torch.einsum("hn,nhd->hd", scores.softmax(-1), values)
        return out.to(dtype)[None, None], None
