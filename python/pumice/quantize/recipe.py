"""What a compression method is to :func:`pumice.compress`: a recipe.

A recipe is a frozen dataclass of the method's settings. Its unit of work is a set of named linear
layers of one model, for which it returns replacements; :func:`pumice.compress` chooses the layers,
measures, and puts the replacements in place. A method that looks at one weight at a time derives
from :class:`LinearRecipe`; one that needs to see activations, from
:class:`pumice.quantize.calibrated.CalibratedRecipe`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from pumice._calibrate import Measurement, measure
from pumice.calibration import Settings, Stage

# Called with the number of layers done, the number of all, and the name of the last one done.
Progress = Callable[[int, int, str], None]

_RECIPES: dict[str, type[Recipe]] = {}


@dataclass(frozen=True)
class Task:
    """What :func:`pumice.compress` asks of a recipe.

    Attributes:
        model: left as it is.
        layers: of it, by qualified name, to be replaced.
        calibration: inputs of the model, or None.
        progress: called after each layer.
        settings: how a calibration runs.
    """

    model: nn.Module
    layers: Mapping[str, nn.Linear]
    calibration: Iterable[Any] | None
    progress: Progress
    settings: Settings


@dataclass
class Outcome:
    """What a recipe gives :func:`pumice.compress`.

    Attributes:
        replacements: by qualified name: a compressed layer for each layer chosen, and whatever else
            must change with them, such as a norm that a scale was folded into.
        measurements: of layers whose error was measured, by name.
    """

    replacements: dict[str, nn.Module]
    measurements: dict[str, Measurement] = field(default_factory=dict)


class Recipe(ABC):
    """Settings of a compression method. Subclasses are frozen dataclasses."""

    name: ClassVar[str]

    # False for a recipe that only prepares weights for the one that follows it.
    compresses: ClassVar[bool] = True

    # Whether weights become zero; the report then says which share of each layer did.
    prunes: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            _RECIPES[cls.name] = cls

    def __post_init__(self) -> None:
        self.validate()

    @abstractmethod
    def validate(self) -> None:
        """TypeError or ValueError, naming the setting, if one is not acceptable."""

    @abstractmethod
    def apply(self, task: Task) -> Outcome:
        """Replacements for the layers of a task. Errors name the layer."""

    @abstractmethod
    def compress_outside(self, name: str, linear: nn.Linear) -> nn.Module:
        """The replacement of one layer without calibration, as for those outside of any block."""

    def stages(self) -> list[Stage] | None:
        """Its steps for :func:`pumice.calibration.run`, if it can be combined with others."""
        return None

    @property
    def outlier_threshold(self) -> float | None:
        """Size from which the method treats an activation as an outlier, if it does."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """``{"name": …, setting: value, …}``, as stored in checkpoints."""
        return {"name": self.name, **dataclasses.asdict(self)}  # type: ignore[call-overload]


class LinearRecipe(Recipe):
    """A method that compresses each weight by itself."""

    @abstractmethod
    def compress_linear(self, linear: nn.Linear) -> nn.Module:
        """The replacement of one layer, which is left as it is."""

    def compress_named(self, name: str, linear: nn.Linear) -> nn.Module:
        """The same for a method whose settings differ from layer to layer."""
        return self.compress_linear(linear)

    def compress_outside(self, name: str, linear: nn.Linear) -> nn.Module:
        return self.compress_named(name, linear)

    def apply(self, task: Task) -> Outcome:
        replacements: dict[str, nn.Module] = {}
        for done, (name, linear) in enumerate(task.layers.items(), start=1):
            try:
                replacements[name] = self.compress_named(name, linear)
            except (TypeError, ValueError) as error:
                raise type(error)(f"layer {name!r}: {error}") from error
            task.progress(done, len(task.layers), name)
        if task.calibration is None:
            return Outcome(replacements)
        measured = measure(
            task.model, task.layers, replacements, task.calibration, self.outlier_threshold
        )
        return Outcome(replacements, measured)


def recipe_names() -> list[str]:
    """The names of all methods."""
    return sorted(_RECIPES)


def make_recipe(name: str, **settings: Any) -> Recipe:
    """A recipe by the name of its method: ``make_recipe("llm_int8", threshold=6.0)``.

    Hyphens count as underscores.

    Raises:
        ValueError: no method of that name, or no such setting, or a value out of range.
    """
    recipe_type = _RECIPES.get(name.replace("-", "_")) if isinstance(name, str) else None
    if recipe_type is None:
        raise ValueError(f"unknown recipe {name!r}; there are: {', '.join(recipe_names())}")
    accepted = [field.name for field in dataclasses.fields(recipe_type)]  # type: ignore[arg-type]
    unknown = sorted(settings.keys() - set(accepted))
    if unknown:
        raise ValueError(
            f"recipe {recipe_type.name!r} has no setting {', '.join(map(repr, unknown))}; it has: "
            f"{', '.join(accepted)}"
        )
    return recipe_type(**settings)


def recipe_from_dict(stored: Mapping[str, Any]) -> Recipe:
    """The inverse of :meth:`Recipe.to_dict`."""
    if not isinstance(stored, Mapping) or "name" not in stored:
        raise ValueError(f"a stored recipe must be a mapping with a 'name', not {stored!r}")
    return make_recipe(**stored)
