"""State dicts in safetensors files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pumice._files import sha256_of

# A file never needs more memory than this to be written from a GPU.
MAX_FILE_BYTES = 5_000_000_000

# The dtypes of a state dict, by the names in the header of a safetensors file.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def require_safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "saving and loading checkpoints needs safetensors: pip install 'pumice[hf]'"
        ) from error
    return safetensors


@dataclass(frozen=True)
class StoredState:
    """The tensors to write, each memory once, and the other names of the same memory."""

    tensors: dict[str, Tensor]
    tied: dict[str, str]  # alias -> name in tensors


def collect(model: nn.Module) -> StoredState:
    """The state of a model, with tied tensors found by their memory.

    Raises:
        ValueError: an entry that is no tensor, or a tensor on "meta", named.
    """
    # Of a tied pair, transformers looks for the name that is not listed as tied.
    redundant = set(getattr(model, "_tied_weights_keys", None) or ())
    state = model.state_dict()
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[Any, str] = {}
    storages: set[Any] = set()
    for name in sorted(state, key=lambda name: name in redundant):
        tensor = state[name]
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"save: state dict entry {name!r} is a {type(tensor).__name__}, not a tensor; only "
                "tensors can be stored in safetensors"
            )
        if tensor.is_meta:
            raise ValueError(f"save: {name!r} is on 'meta': it has no data to save")
        memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and memory in names:
            tied[name] = names[memory]
            continue
        names[memory] = name
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        # Two views of one memory that are not the same view become two tensors.
        tensors[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return StoredState(tensors, tied)


def write(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, dict[str, Any]]:
    """Write the files; returns the length and SHA-256 of each by name."""
    save_file = require_safetensors().torch.save_file
    groups = _split(tensors)
    weight_map: dict[str, str] = {}
    files: dict[str, dict[str, Any]] = {}
    for index, group in enumerate(groups, start=1):
        several = len(groups) > 1
        file_name = (
            f"model-{index:05d}-of-{len(groups):05d}.safetensors"
            if several
            else "model.safetensors"
        )
        path = folder / file_name
        on_cpu = {name: tensors[name].detach().cpu().contiguous() for name in group}
        save_file(on_cpu, path, metadata={"format": "pt"})
        files[file_name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        weight_map.update(dict.fromkeys(group, file_name))
    if len(groups) > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=2))
    return files


def _split(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        count = tensor.numel() * tensor.element_size()
        if groups[-1] and size + count > MAX_FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += count
    return groups


def check_files(folder: Path, files: Mapping[str, Any], *, verify: bool) -> None:
    """ValueError unless each file is there with its length and, if asked, its SHA-256."""
    for name, expected in files.items():
        if "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{folder}: pumice.json names {name!r}, which is no safetensors file")
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing, but pumice.json lists it")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise ValueError(
                f"{path} is truncated or not the file that was saved: {size} bytes instead of "
                f"{expected['bytes']}"
            )
        if verify and sha256_of(path) != expected["sha256"]:
            raise ValueError(
                f"{path} was changed since it was saved: its SHA-256 is not the one in pumice.json"
            )


class StoredTensors:
    """Tensors of open safetensors files, read one at a time."""

    def __init__(self, handles: Mapping[str, Any]) -> None:
        self._handle_of: dict[str, Any] = {}
        for file_name, handle in handles.items():
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                if name in self._handle_of:
                    raise ValueError(f"tensor {name!r} is stored twice, again in {file_name}")
                self._handle_of[name] = handle

    def names(self) -> set[str]:
        return set(self._handle_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handle_of[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        stored = self._handle_of[name].get_slice(name).get_dtype()
        if stored not in _DTYPES:
            raise ValueError(f"tensor {name!r} has dtype {stored}, which pumice does not write")
        return _DTYPES[stored]

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._handle_of[name].get_tensor(name)
        return tensor


@contextmanager
def opened(folder: Path, file_names: Iterator[str] | list[str]) -> Iterator[StoredTensors]:
    """Open the files of a checkpoint; ValueError, naming the file, for one that is malformed."""
    safetensors = require_safetensors()
    with ExitStack() as stack:
        handles = {}
        for name in file_names:
            try:
                handle = safetensors.safe_open(folder / name, framework="pt", device="cpu")
                handles[name] = stack.enter_context(handle)
            except safetensors.SafetensorError as error:
                raise ValueError(f"{folder / name} is not a valid safetensors file: {error}") from (
                    error
                )
        yield StoredTensors(handles)
