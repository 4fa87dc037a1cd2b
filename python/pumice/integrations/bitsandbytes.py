"""Checkpoints of bitsandbytes' int8 layers (Linear8bitLt, LLM.int8()).

Such a layer stores ``weight`` int8 [N, K], ``SCB`` fp32 [N], the absolute maximum of each row, and
``weight_format``, a mark of the memory layout: W = weight · SCB / 127. Ours stores ``qweight`` and
``weight_scale`` = SCB / 127. bitsandbytes itself is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pumice._assign import StateDictSource, adopt, check_skeleton
from pumice.nn._bitsandbytes import convert_layer
from pumice.nn._replace import find_linear, replace_modules
from pumice.nn.int8_mixed_linear import Int8MixedLinear


def convert_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A bitsandbytes int8 state dict in pumice's names; other entries pass through.

    Raises:
        ValueError: no int8 layer in it, or a malformed one, named.
    """
    prefixes = [name[: -len("SCB")] for name in state_dict if name.split(".")[-1] == "SCB"]
    if not prefixes:
        raise ValueError(
            "no int8 layer of bitsandbytes in this state dict: no name ends with 'SCB'"
        )
    converted = dict(state_dict)
    for prefix in prefixes:
        convert_layer(converted, prefix)
    return converted


def load_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    *,
    threshold: float = 6.0,
    per_element: bool = False,
) -> nn.Module:
    """Load a bitsandbytes int8 state dict into an uncompressed model of its dtype, in place.

    Each ``nn.Linear`` that the state dict holds as int8 becomes an
    :class:`~pumice.nn.Int8MixedLinear` (bitsandbytes does not store the threshold: pass the one the
    model was made with); the rest loads as it is, strictly. The model may be on "meta"; on an error
    it is as before.

    Raises:
        ValueError: a name that is no Linear of the model; a tensor missing, unexpected, or of
            another shape or dtype.
    """
    converted = convert_state_dict(state_dict)
    replacements: dict[str, nn.Module] = {}
    for name in (key.removesuffix(".qweight") for key in converted if key.endswith(".qweight")):
        linear = find_linear(model, name)
        weight = linear.weight
        replacements[name] = Int8MixedLinear(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            threshold=threshold,
            per_element=per_element,
            device="meta",
            dtype=weight.dtype,
        ).train(linear.training)
    source = StateDictSource(converted)
    plan = check_skeleton(model, replacements, source, tied={}, check_dtypes=True)
    model = replace_modules(model, replacements)
    adopt(model, plan, source, {}, torch.device("cpu"))
    return model
