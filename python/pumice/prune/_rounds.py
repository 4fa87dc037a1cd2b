"""Finished rounds of :class:`pumice.PruneAndTune` on disk, to go on after an interruption."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pumice._tensors import require_safetensors
from pumice.calibration.resume import digest_of, weights_digest, write


class Rounds:
    """A folder with one subfolder for each round; without a folder nothing is kept.

    A round's subfolder holds the run of its criterion, and ``tuned.safetensors`` once its training
    is done.
    """

    def __init__(self, folder: Path | None, about: str) -> None:
        self._folder = folder
        self._about = about

    @classmethod
    def open(
        cls,
        folder: str | Path | None,
        recipe: Mapping[str, Any],
        model: nn.Module,
        layers: Iterable[str],
        data: Sequence[Any],
    ) -> Rounds:
        """Begin a run, or go on with the one that the folder holds.

        Args:
            recipe: its settings.
            model: as it is before the first round.
            layers: the names of those that are pruned.
            data: the calibration inputs.
        """
        if folder is None:
            return cls(None, "")
        with torch.no_grad():
            about = {
                "recipe": dict(recipe),
                "layers": list(layers),
                "weights": weights_digest(model),
                "calibration": digest_of(data),
            }
        return cls(Path(folder), json.dumps(about, sort_keys=True))

    def folder(self, index: int) -> Path | None:
        """For the criterion's own run."""
        return None if self._folder is None else self._folder / f"round-{index:02d}"

    def restore(self, index: int, layers: Mapping[str, nn.Linear]) -> bool:
        """Give the layers what a finished round left; False if it is not finished.

        Raises:
            ValueError: the folder is of another run, or the file is broken.
        """
        path = self._file(index)
        if path is None or not path.is_file():
            return False
        safetensors = require_safetensors()
        try:
            with safetensors.safe_open(path, framework="pt", device="cpu") as file:
                about = (file.metadata() or {})["pumice"]
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, KeyError) as error:
            raise ValueError(f"resume: {path} is not a finished round: {error}") from error
        if about != self._about:
            raise ValueError(
                f"resume: {path} is of another run: other settings, layers, weights or calibration "
                "data; pass another folder, or remove this one to start anew"
            )
        with torch.no_grad():
            for name, linear in layers.items():
                for key, parameter in linear.named_parameters():
                    parameter.copy_(state[f"{name}/{key}"])
        return True

    def record(self, index: int, layers: Mapping[str, nn.Linear]) -> None:
        """Write what a round left."""
        path = self._file(index)
        if path is None:
            return
        tensors: dict[str, Tensor] = {
            f"{name}/{key}": parameter.detach().cpu().contiguous().clone()
            for name, linear in layers.items()
            for key, parameter in linear.named_parameters()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, require_safetensors().torch.save(tensors, {"pumice": self._about}))

    def _file(self, index: int) -> Path | None:
        folder = self.folder(index)
        return None if folder is None else folder / "tuned.safetensors"
