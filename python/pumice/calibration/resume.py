"""Finished blocks on disk, so that a run that was killed can go on where it stopped.

A folder holds ``run.json``, which says what run it is, and one safetensors file for each finished
block. Every file appears complete or not at all. Activations are not stored: finished blocks are
run again, which is fast beside compressing them and gives the same bits.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pumice._tensors import require_safetensors
from pumice.calibration.block import Block
from pumice.calibration.comm import rank, smallest
from pumice.calibration.inputs import BlockInputs, map_structure
from pumice.nn import CompressedLinear, layer_from_config

_RUN = "run.json"


class Journal:
    """The finished blocks of a run; one without a folder holds none and writes nothing."""

    def __init__(self, folder: Path | None, finished: int) -> None:
        self._folder = folder
        self._finished = finished

    @classmethod
    def open(
        cls,
        folder: str | Path | None,
        blocks: Sequence[str],
        inputs: BlockInputs,
        fingerprint: Mapping[str, Any],
    ) -> Journal:
        """Begin a run, or go on with the one that the folder holds.

        In a distributed run all processes must see the same folder; process 0 writes.

        Raises:
            ValueError: the folder holds another run: other settings, layers or calibration data.
            ImportError: safetensors is not installed.
        """
        if folder is None:
            return cls(None, 0)
        require_safetensors()
        path = Path(folder)
        ours = {
            "format": "pumice-run",
            "blocks": list(blocks),
            **json.loads(json.dumps(fingerprint)),
        }
        calibration = _digest(inputs)
        file = path / _RUN
        if file.is_file():
            theirs = json.loads(file.read_text(encoding="utf-8"))
            digests = theirs.pop("calibration", {})
            differing = sorted(
                k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)
            )
            if digests.get(str(rank()), calibration) != calibration:
                differing.append("calibration")
            if differing:
                raise ValueError(
                    f"resume: {path} holds another run, which differs in {', '.join(differing)}; "
                    "pass another folder, or remove this one to start anew"
                )
        elif rank() == 0:
            path.mkdir(parents=True, exist_ok=True)
            ours["calibration"] = {"0": calibration}
            write(file, json.dumps(ours, indent=1).encode())
        finished = 0
        while _block_file(path, finished).is_file():
            finished += 1
        return cls(path, smallest(finished))

    def holds(self, index: int) -> bool:
        return index < self._finished

    def record(
        self, index: int, original: nn.Module, block: Block, errors: Mapping[str, float]
    ) -> None:
        """Write a finished block."""
        if self._folder is None or rank() != 0:
            return
        save = require_safetensors().torch.save
        tensors: dict[str, Tensor] = {}
        configs: dict[str, Any] = {}
        for name, new in block.replacements.items():
            configs[name] = new.config() if isinstance(new, CompressedLinear) else None
            for key, tensor in new.state_dict().items():
                # "/" stands in no module's name
                tensors[f"{name}/{key}"] = tensor.detach().cpu().contiguous().clone()
        about = {"weights": weights_digest(original), "layers": configs, "errors": dict(errors)}
        write(_block_file(self._folder, index), save(tensors, {"pumice": json.dumps(about)}))

    def restore(self, index: int, original: nn.Module, block: Block) -> dict[str, float]:
        """Give a working copy what was recorded for it; returns the errors of its layers.

        Raises:
            ValueError: the file is broken, or the model's weights are not those it was made from.
        """
        assert self._folder is not None
        path = _block_file(self._folder, index)
        safetensors = require_safetensors()
        try:
            with safetensors.safe_open(path, framework="pt", device="cpu") as file:
                about = json.loads((file.metadata() or {})["pumice"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"resume: {path} is not a finished block: {error}") from error
        if about["weights"] != weights_digest(original):
            raise ValueError(
                f"resume: {path} was made from other weights than the model's block "
                f"{block.name!r}; pass another folder, or remove this one to start anew"
            )
        for name, config in about["layers"].items():
            state = {
                key.partition("/")[2]: tensor.to(block.device)
                for key, tensor in tensors.items()
                if key.partition("/")[0] == name
            }
            if config is None and name in block.layers:  # pruned, and stored as a linear layer
                dense = copy.deepcopy(block.layers[name])
                dense.load_state_dict(state)
                block.replace(name, dense)
                continue
            if config is None:
                block.module.get_submodule(name).load_state_dict(state)
                block.touch(name)
                continue
            linear = block.layers[name]
            layer = layer_from_config(config, device=block.device, dtype=linear.weight.dtype)
            layer.load_state_dict(state)
            if layer.bias is not None:
                layer.bias.requires_grad_(linear.bias.requires_grad)
            block.replace(name, layer.train(linear.training))
        return {name: float(error) for name, error in about["errors"].items()}


def _block_file(folder: Path, index: int) -> Path:
    return folder / f"block-{index:04d}.safetensors"


def write(path: Path, content: bytes) -> None:
    draft = path.with_suffix(".tmp")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _digest(inputs: BlockInputs) -> str:
    """Of all that the first block is called with: the data, and the model up to there."""
    return digest_of(
        [
            (hidden, *calls[0].args, *calls[0].kwargs.values())
            for hidden, calls in zip(inputs.activations, inputs.calls, strict=True)
        ]
    )


def digest_of(values: Any) -> str:
    """Of the tensors in nested tuples, lists and dicts."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{list(value.shape)}".encode())
            digest.update(
                value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
                if value.dim()
                else str(value.item()).encode()
            )

    map_structure(add, values)
    return digest.hexdigest()


def weights_digest(module: nn.Module) -> list[str]:
    """Of a module's parameters: two sums of each, enough to tell one model from another."""
    return [
        f"{float(p.double().sum()).hex()} {float(p.double().square().sum()).hex()}"
        for p in module.parameters()
    ]
