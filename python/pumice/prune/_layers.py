"""What stands in the place of a pruned layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def dense_layer(linear: nn.Linear, weight: Tensor) -> nn.Linear:
    """A linear layer like ``linear`` with another weight, of the same dtype."""
    layer = nn.Linear(
        linear.in_features, linear.out_features, linear.bias is not None, device="meta"
    )
    old = linear.weight
    layer.weight = nn.Parameter(
        weight.detach().to(old.dtype, copy=True, memory_format=torch.contiguous_format),
        requires_grad=old.requires_grad,
    )
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach().clone(), linear.bias.requires_grad)
    return layer.train(linear.training)
