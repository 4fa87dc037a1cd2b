"""Folders that appear complete or not at all, and files that are what they claim to be."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CHUNK = 1 << 22


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def new_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that takes the place of ``folder`` when the block ends without an error.

    It stands beside ``folder``, so that one rename publishes it. If anything is raised, it is
    removed and ``folder`` is as before. With ``overwrite``, files of an existing folder that are no
    part of a checkpoint are kept.

    Raises:
        FileExistsError: ``folder`` is a file, or holds something and ``overwrite`` is False.
        OSError: the place is not writable, the disk is full; the message names the folder.
    """
    folder = folder.resolve()  # a link to a folder stays one
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; pass the name of a folder")
    occupied = folder.is_dir() and any(folder.iterdir())
    if occupied and not overwrite:
        raise FileExistsError(
            f"{folder} exists and is not empty; pass another folder, or overwrite=True"
        )
    draft = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.tmp"
    created = [path for path in [folder.parent, *folder.parent.parents] if not path.exists()]
    try:
        draft.mkdir(parents=True)
        yield draft
        if occupied:
            _copy_missing(folder, draft)
        _sync(draft)
        _publish(draft, folder, occupied)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        for parent in created:  # innermost first
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        if isinstance(error, OSError) and not isinstance(error, FileExistsError):
            reason = error.strerror or str(error)
            raise type(error)(error.errno, f"cannot write {folder}: {reason}") from error
        raise


def _copy_missing(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if (target / path.name).exists() or _is_generated(path.name):
            continue
        if path.is_dir():
            shutil.copytree(path, target / path.name, symlinks=True)
        else:
            shutil.copy2(path, target / path.name, follow_symlinks=False)


def _is_generated(name: str) -> bool:
    """Whether a file of that name belongs to the checkpoint being replaced."""
    return name.endswith((".safetensors", ".safetensors.index.json")) or name in (
        "pumice.json",
        "config.json",
        "generation_config.json",
        "quantize_config.json",  # settings of weights that other libraries quantized
        "quant_config.json",
    )


def _publish(draft: Path, folder: Path, occupied: bool) -> None:
    if not occupied:
        os.rename(draft, folder)  # also over an empty folder
        return
    aside = draft.with_suffix(".old")
    os.rename(folder, aside)
    try:
        os.rename(draft, folder)
    except BaseException:
        os.rename(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sync(folder: Path) -> None:
    """The contents must reach the disk before the rename does."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())
