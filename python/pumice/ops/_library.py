"""Load the compiled operators, and tell torch what they do without running them.

``libpumice_cpu`` holds every schema and the CPU kernels; ``libpumice_cuda`` adds the CUDA kernels
and is loaded only beside a CUDA build of torch. A CUDA library that does not load never breaks the
import: the reason is kept, and given by the first call that needs it and by :func:`pumice.doctor`.

Each module of :mod:`pumice.ops` declares the fake (shapes and dtypes alone) and the gradient of its
operators here; :func:`register` attaches all of them to a namespace of ``torch.ops``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BUILD_HINT = (
    "Build it beside the torch of this environment: `pip install --no-build-isolation .` in the "
    "source tree (add -e for an editable install)."
)

# The functions of pumice.ops look their operators up here, so that the tests can run them on
# another implementation of the same schemas.
ops: Any = torch.ops.pumice

_load_library: Any = torch.ops.load_library

# Devices with kernels. On "meta" the fakes run.
devices: set[str] = {"meta"}

# Why there are no CUDA kernels; None once they are loaded.
cuda_unavailable: str | None = "the CUDA library was not looked for"


@dataclass(frozen=True)
class _Operator:
    """What torch must know of an operator beside its kernels."""

    name: str
    fake: Callable[..., Any]
    backward: Callable[..., Any] | None  # None: writes into its arguments, as torch allows it
    setup_context: Callable[..., None] | None


_declared: list[_Operator] = []


def declare(
    name: str,
    *,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Remember the fake and the gradient of an operator for :func:`register`."""
    _declared.append(_Operator(name, fake, backward, setup_context))


def register(namespace: str) -> None:
    """Attach the declared fakes and gradients to the operators of ``torch.ops.<namespace>``."""
    for operator in _declared:
        qualified_name = f"{namespace}::{operator.name}"
        torch.library.register_fake(qualified_name, operator.fake)
        if operator.backward is not None:
            torch.library.register_autograd(
                qualified_name, operator.backward, setup_context=operator.setup_context
            )


def not_differentiable(name: str, advice: str) -> Callable[..., Any]:
    """A gradient that refuses: the forward pass is allowed to run where gradients are on."""

    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f"pumice.ops.{name} is not differentiable. {advice}")

    return backward


def library_folder() -> Path:
    """The folder of the compiled libraries; an ImportError that says how to build, without them."""
    try:
        from pumice import _C
    except ImportError as error:
        raise ImportError(f"pumice is not built ({error}). {BUILD_HINT}") from error
    # Beside the compiled module, not beside this file: in an editable install they lie apart.
    return Path(str(_C.__file__)).parent / "lib"


def _load_cpu(folder: Path) -> None:
    path = folder / "libpumice_cpu.so"
    if not path.exists():
        raise ImportError(f"pumice is not built: {path} is missing. {BUILD_HINT}")
    try:
        _load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"{path} does not load beside torch {torch.__version__} (2.10 or newer is needed): "
            f"{error}"
        ) from error
    devices.add("cpu")


def _load_cuda(folder: Path) -> str | None:
    """Load the CUDA kernels, or say why not."""
    path = folder / "libpumice_cuda.so"
    reasons = []
    if torch.version.cuda is None:
        kind = "ROCm" if getattr(torch.version, "hip", None) else "CPU-only"
        reasons.append(
            f"torch {torch.__version__} is a {kind} build (install a CUDA build of torch, "
            "https://pytorch.org/get-started)"
        )
    if not path.exists():
        reasons.append(
            "this build of pumice has none, for no nvcc was found when it was built (put nvcc on "
            "PATH or set CUDACXX, then reinstall pumice from source)"
        )
    if reasons:
        return "; and ".join(reasons)
    try:
        _load_library(str(path))
    except OSError as error:
        return f"{path} does not load beside torch {torch.__version__}: {error}"
    devices.add("cuda")
    return None


def no_kernel(op: str, device: torch.device) -> RuntimeError:
    """The error of a call on a device that has no kernels: what is missing, how to get it."""
    if device.type == "cuda":
        return RuntimeError(f"{op}: no CUDA kernels, because {cuda_unavailable}.")
    return RuntimeError(
        f"{op}: pumice has no kernels for device '{device.type}'; it runs on "
        f"{' and '.join(sorted(devices - {'meta'}))}. Move the model and its inputs there."
    )


def load() -> None:
    """Load the libraries of this installation."""
    global cuda_unavailable
    folder = library_folder()
    _load_cpu(folder)
    cuda_unavailable = _load_cuda(folder)


load()
