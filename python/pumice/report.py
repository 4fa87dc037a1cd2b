"""What compression did to a model, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# The attribute of a model that holds its report; it follows the model through copies and pickles.
_ATTRIBUTE = "_pumice_report"


@dataclass(frozen=True)
class LayerReport:
    """One compressed layer.

    Attributes:
        name: qualified name in the model; "" where the model itself was the layer.
        layer: the type of the replacement.
        in_features, out_features: K and N.
        bytes_before, bytes_after: of weight, scales and bias.
        outlier_columns: columns of the input that held an outlier in any calibration input.
        outlier_fraction: the share of columns that held one, averaged over the calibration inputs.
        relative_error: ‖y' - y‖ / ‖y‖ over all calibration inputs (Frobenius norms), y the output
            of the uncompressed layer and y' that of its replacement on the same input.
        sparsity: the share of weights that are zero.

    The outliers and the error are None without calibration, the outliers also where the method has
    none; the sparsity where the method does not prune.
    """

    name: str
    layer: str
    in_features: int
    out_features: int
    bytes_before: int
    bytes_after: int
    outlier_columns: int | None = None
    outlier_fraction: float | None = None
    relative_error: float | None = None
    sparsity: float | None = None


@dataclass(frozen=True)
class Report:
    """What :func:`pumice.compress` did.

    Attributes:
        recipes: the settings of each method applied, in order.
        layers: one row for each compressed layer.
        skipped: linear layers left as they are, with the reason, by name.
        model_bytes_before, model_bytes_after: all parameters and buffers, each tensor counted once.
    """

    recipes: list[dict[str, Any]]
    layers: list[LayerReport]
    skipped: dict[str, str] = field(default_factory=dict)
    model_bytes_before: int = 0
    model_bytes_after: int = 0

    @property
    def bytes_before(self) -> int:
        """Of the compressed layers."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Of the compressed layers."""
        return sum(layer.bytes_after for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, as stored in checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Report:
        """The inverse of :meth:`to_dict`; TypeError on unknown or missing entries."""
        return cls(**{**stored, "layers": [LayerReport(**layer) for layer in stored["layers"]]})

    def __str__(self) -> str:
        header = (
            "layer", "type", "in", "out", "before", "after", "zeros", "outlier columns", "error",
        )  # fmt: skip
        rows = [_row(layer) for layer in self.layers]
        total = ("compressed layers", "", "", "", _size(self.bytes_before), _size(self.bytes_after))
        model = ("model", "", "", "", _size(self.model_bytes_before), _size(self.model_bytes_after))
        # Columns that nothing was measured for are left out.
        kept = [i for i in range(len(header)) if i < 6 or any(row[i] for row in rows)]
        table = [
            [line[i] if i < len(line) else "" for i in kept]
            for line in (header, *rows, total, model)
        ]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        ]
        rule = "-" * max(map(len, lines))
        recipes = "; ".join(_settings(recipe) for recipe in self.recipes)
        left = [f"left as it is: {name} ({why})" for name, why in self.skipped.items()]
        return "\n".join([recipes, lines[0], rule, *lines[1:-2], rule, *lines[-2:], *left])


def report(model: nn.Module) -> Report:
    """The report of a model that :func:`pumice.compress` made or :func:`pumice.load` read.

    Raises:
        ValueError: the model was not compressed by pumice.
    """
    found = find_report(model)
    if found is None:
        raise ValueError(
            f"this {type(model).__name__} has no report: it was not compressed by pumice.compress"
        )
    return found


def find_report(model: nn.Module) -> Report | None:
    """The report of a model, or None."""
    found = getattr(model, _ATTRIBUTE, None)
    return found if isinstance(found, Report) else None


def attach_report(model: nn.Module, result: Report) -> None:
    setattr(model, _ATTRIBUTE, result)


def bytes_of(module: nn.Module) -> int:
    """Bytes of all parameters and buffers of a module, each tensor counted once."""
    seen: dict[Any, int] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        if not is_lazy(tensor):  # a LazyLinear that never ran has no size yet
            seen[_storage_key(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def _storage_key(tensor: Tensor) -> Any:
    # Two parameters may be one memory; on "meta" no address tells.
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr()


def _settings(recipe: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{key}={value}" for key, value in recipe.items() if key != "name")
    return f"{recipe['name']}({settings})"


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 10_000 else f"{count} B"


def _row(layer: LayerReport) -> tuple[str, ...]:
    outliers = ""
    if layer.outlier_columns is not None and layer.outlier_fraction is not None:
        outliers = f"{layer.outlier_columns} ({layer.outlier_fraction:.2%} an input)"
    return (
        layer.name or "(the model)",
        layer.layer,
        str(layer.in_features),
        str(layer.out_features),
        _size(layer.bytes_before),
        _size(layer.bytes_after),
        "" if layer.sparsity is None else f"{layer.sparsity:.2%}",
        outliers,
        "" if layer.relative_error is None else f"{layer.relative_error:.2e}",
    )
