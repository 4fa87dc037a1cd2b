"""Other libraries' models and checkpoint formats."""

from __future__ import annotations

import sys

from torch import nn


def is_transformers_model(model: nn.Module) -> bool:
    """Whether a model is one of transformers, which is not imported to find out."""
    if "transformers" not in sys.modules:  # then nobody made such a model
        return False
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)
