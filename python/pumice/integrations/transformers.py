"""transformers models: their configuration in a checkpoint, and ``from_pretrained`` for it.

After ``import pumice.integrations.transformers``, transformers (5 or newer) opens what
:func:`pumice.save` or, after :func:`pumice.compress`, its own ``save_pretrained`` wrote::

    model = AutoModelForCausalLM.from_pretrained(folder)

and any model with ``attn_implementation="pumice"`` (:mod:`pumice.integrations.attention`).
:func:`pumice.load` does so with any transformers, and checks more (digests, unexpected tensors,
dtypes).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from pumice.integrations import attention
from pumice.nn import CompressedLinear, layer_from_config
from pumice.nn._replace import find_linear, replace_modules

try:
    import transformers
    from transformers.quantizers import (
        HfQuantizer,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(
        "models of transformers need transformers >= 4.57: pip install 'pumice[hf]'"
    ) from error

QUANT_METHOD = "pumice"

attention.register()


@register_quantization_config(QUANT_METHOD)
class PumiceConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a compressed model: the settings of each layer, by name."""

    def __init__(self, layers: dict[str, dict[str, Any]] | None = None, **kwargs: Any) -> None:
        super().__init__(quant_method=QUANT_METHOD)
        if not layers:
            raise ValueError(
                "quantization_config of method 'pumice' lists no layers: transformers only opens "
                "models that pumice.compress made and pumice.save wrote"
            )
        self.layers = layers


@register_quantizer(QUANT_METHOD)
class PumiceQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts the compressed layers in place before transformers loads the weights."""

    requires_calibration = True  # nothing is compressed while a model loads
    requires_parameters_quantization = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        # Version 4 casts every floating-point tensor of a quantized model, our fp32 scales too.
        if int(transformers.__version__.split(".")[0]) < 5:
            raise ImportError(
                "from_pretrained opens pumice checkpoints with transformers >= 5, and this is "
                f"{transformers.__version__}; pumice.load(folder) works with this version"
            )

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        layers: dict[str, nn.Module] = {}
        for name, config in self.quantization_config.layers.items():
            linear = find_linear(model, name)
            dtype = linear.weight.dtype if linear.bias is None else linear.bias.dtype
            layers[name] = layer_from_config(config, device="meta", dtype=dtype)
        return replace_modules(model, layers)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, layer in model.named_modules():
            if isinstance(layer, CompressedLinear):
                try:
                    layer.check_values(dict(layer.named_buffers(recurse=False)))
                except ValueError as error:
                    raise ValueError(f"layer {name!r}: {error}") from error
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top: gradients flow through Int8MixedLinear to its input."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def describe_layers(model: Any) -> None:
    """Write a model's compressed layers into its config, which ``save_pretrained`` stores."""
    layers = {
        name: module.config()
        for name, module in model.named_modules()
        if isinstance(module, CompressedLinear)
    }
    if layers:
        model.config.quantization_config = PumiceConfig(layers)


def save_config(model: Any, folder: Path) -> None:
    """Write config.json and generation_config.json, from which the model can be built again."""
    describe_layers(model)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    # Under its old name before 4.56.
    setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", model.dtype)
    config.save_pretrained(folder)
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def build_skeleton(folder: Path) -> nn.Module:
    """The uncompressed model that config.json describes, its parameters on "meta".

    Buffers are real: those that no checkpoint holds (rotary tables) are computed by the model.
    """
    from accelerate import init_empty_weights

    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no config.json, so its model is not one of transformers: pass the "
            "uncompressed model to load into, pumice.load(folder, model)"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{folder}/config.json describes no model that transformers {transformers.__version__} "
            "knows; pass the uncompressed model to load into, pumice.load(folder, model)"
        ) from error
    names = config.architectures or []
    model_type = getattr(transformers, names[0], None) if names else None
    if model_type is None:
        raise ValueError(
            f"{folder}/config.json: architecture {names} is not one of transformers "
            f"{transformers.__version__}; pass the uncompressed model to load into, "
            "pumice.load(folder, model)"
        )
    with init_empty_weights(include_buffers=False):
        model = model_type._from_config(config)
    model.tie_weights()
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    skeleton: nn.Module = model.eval()
    return skeleton
