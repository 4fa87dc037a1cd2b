"""The one verb: replace the linear layers of a model by compressed ones."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pumice._calibrate import Measurement
from pumice._targets import DEFAULT_EXCLUDE, Selection, find_targets
from pumice.calibration import Settings
from pumice.integrations import is_transformers_model
from pumice.nn._linear import weight_of
from pumice.nn._replace import leave_fused_paths, replace_modules
from pumice.quantize.calibrated import apply
from pumice.quantize.recipe import Progress, Recipe, Task
from pumice.report import LayerReport, Report, attach_report, bytes_of, find_report

__all__ = ["DEFAULT_EXCLUDE", "compress"]


def compress(
    model: nn.Module,
    recipe: Recipe | Sequence[Recipe],
    calibration: Iterable[Any] | None = None,
    *,
    include: Selection | None = None,
    exclude: Selection = DEFAULT_EXCLUDE,
    inplace: bool = False,
    progress: Progress | None = None,
    blocks: str | None = None,
    device: torch.device | str | None = None,
    offload: bool = False,
    resume: str | Path | None = None,
) -> nn.Module:
    """Compress the linear layers of any PyTorch model.

    ::

        model = pumice.compress(model, pumice.LLMInt8(threshold=6.0))
        print(pumice.report(model))

    Left as they are: output embeddings (``lm_head``); layers whose weight is tied to an embedding
    or another layer that stays; layers not called through ``nn.Linear.forward`` (a subclass with
    its own, ``nn.MultiheadAttention``'s ``out_proj``, parametrized weights). The report names them.
    A layer standing in two places is replaced by one layer in both.

    **Methods that need calibration** (:class:`pumice.GPTQ`, :class:`pumice.AWQ`,
    :class:`pumice.Wanda`, :class:`pumice.SparseGPT`) go through the model's repeated blocks one at
    a time: a copy of one block is changed, and its outputs are the next block's inputs. In a
    ``torch.distributed`` process group every process passes its own share of the calibration data;
    what is gathered is summed, and all get the same model.

    Args:
        model: on a device that pumice has kernels for.
        recipe: the method, e.g. :class:`pumice.LLMInt8` or :class:`pumice.GPTQ`; or several that
            are done to each block in turn, such as ``[pumice.AWQScaling(), pumice.GPTQ()]``.
        calibration: inputs of the model, each a tensor, a tuple of arguments or a dict of keyword
            arguments. Methods that do not need them run the uncompressed model on them, and the
            report holds outlier columns and the relative error of each layer's output. Of a dict's
            ``attention_mask`` zeros are padding, which calibrated methods leave out.
        include: which linear layers; all if None. One name pattern or several (``"*.mlp.*"``,
            ``"q_proj"``; :mod:`fnmatch` on the qualified name and on its last part), or a function
            (name, module) -> bool.
        exclude: which not, in the same form; wins over ``include``. Pass ``()`` to have output
            embeddings compressed too.
        inplace: change ``model`` itself. Otherwise the result is independent of it, as a deep copy
            would be: uncompressed parameters are copied, but the weights replaced never are, so the
            extra memory is that of the result.
        progress: called after each layer with (layers done, layers in all, name).
        blocks: for calibrated methods, the name of the ModuleList of repeated blocks, instead of
            the largest one; "" to take the model as one block.
        device: for calibrated methods, where a block computes: a model in the memory of the CPU is
            compressed on a GPU that holds one block of it.
        offload: for calibrated methods, keep the activations between blocks on the CPU.
        resume: for calibrated methods, a folder for finished blocks. After an interruption the same
            call goes on after the last one, with the same result.

    Returns:
        The compressed model: ``model`` itself with ``inplace``, unless it is a bare ``nn.Linear``,
        which nothing holds and whose replacement is returned. A transformers model has its layers
        described in ``model.config.quantization_config``, so that its ``save_pretrained`` works.

    Raises:
        ValueError: no linear layer, or none chosen (the reasons are listed); weights holding NaN or
            infinities (the layer is named); calibration that is empty, lacking, or holds NaN; a
            layer that calibration shows to be dead or singular; recipes that do not go together.
        TypeError: an argument of the wrong type.

    Whatever is raised, ``model`` is as before: replacements are put in place when all are made.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"compress: model must be an nn.Module, not {type(model).__name__}")
    recipes = _checked(recipe)
    if isinstance(calibration, (Tensor, Mapping, str)):
        raise TypeError(
            "compress: calibration must be an iterable of inputs, not one "
            f"{type(calibration).__name__}; pass a list of them"
        )
    targets = find_targets(model, include, exclude)
    layers = targets.layers
    settings = Settings(blocks=blocks, device=device, offload=offload, resume=resume)
    outcome = apply(recipes, Task(model, layers, calibration, progress or _silent, settings))
    replacements, measurements = outcome.replacements, outcome.measurements
    bytes_before = bytes_of(model)
    pruned = any(one.prunes for one in recipes)
    rows = [
        _row(name, linear, replacements[name], measurements.get(name, Measurement()), pruned)
        for name, linear in layers.items()
    ]
    previous = find_report(model)
    for name, linear in layers.items():
        _keep_hooks(linear, replacements[name])
    replaced = {name: model.get_submodule(name) for name in replacements}

    if inplace:
        model = replace_modules(model, replacements)
    else:
        # A deep copy that meets a replacement wherever it comes to a replaced layer.
        memo: dict[int, Any] = {id(replaced[name]): new for name, new in replacements.items()}
        model = copy.deepcopy(model, memo)
        leave_fused_paths(model)
    if is_transformers_model(model):
        from pumice.integrations.transformers import describe_layers

        describe_layers(model)
    attach_report(model, _merge(previous, recipes, rows, targets.skipped, bytes_before, model))
    return model


def _checked(recipe: object) -> list[Recipe]:
    given = list(recipe) if isinstance(recipe, (list, tuple)) else [recipe]
    recipes = [one for one in given if isinstance(one, Recipe)]
    for one in given or [recipe]:
        if not isinstance(one, Recipe):
            raise TypeError(
                "compress: recipe must be a pumice recipe such as pumice.LLMInt8(), or a list of "
                f"them, not {one!r} (pumice.quantize.make_recipe makes one by name)"
            )
    return recipes


def _silent(done: int, total: int, name: str) -> None:
    pass


def _row(
    name: str, linear: nn.Linear, replacement: nn.Module, measured: Measurement, pruned: bool
) -> LayerReport:
    return LayerReport(
        name=name,
        layer=type(replacement).__name__,
        in_features=linear.in_features,
        out_features=linear.out_features,
        bytes_before=bytes_of(linear),
        bytes_after=bytes_of(replacement),
        outlier_columns=measured.outlier_columns,
        outlier_fraction=measured.outlier_fraction,
        relative_error=measured.relative_error,
        sparsity=_zeros(replacement) if pruned else None,
    )


def _zeros(layer: nn.Module) -> float:
    weight = weight_of(layer, torch.float32)
    return 1 - int(weight.count_nonzero()) / weight.numel()


def _keep_hooks(linear: nn.Linear, replacement: nn.Module) -> None:
    """The caller's hooks go on being called."""
    for attribute in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    ):
        getattr(replacement, attribute).update(getattr(linear, attribute))


def _merge(
    previous: Report | None,
    recipes: Sequence[Recipe],
    rows: list[LayerReport],
    skipped: dict[str, str],
    bytes_before: int,
    model: nn.Module,
) -> Report:
    """One report for a model that was compressed in several steps."""
    done = {row.name for row in rows}
    if previous is not None:
        rows = previous.layers + rows
        skipped = {**previous.skipped, **skipped}
        bytes_before = previous.model_bytes_before
    return Report(
        recipes=[
            *(previous.recipes if previous else []),
            *(recipe.to_dict() for recipe in recipes),
        ],
        layers=rows,
        skipped={name: why for name, why in skipped.items() if name not in done},
        model_bytes_before=bytes_before,
        model_bytes_after=bytes_of(model),
    )
