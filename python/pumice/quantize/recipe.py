"""What a compression method is to :func:`pumice.compress`: a recipe.

A recipe is a frozen dataclass of the method's settings. Its unit of work is a set of named linear
layers of one model, for which it returns replacements; :func:`pumice.compress` chooses the layers,
measures, and puts the replacements in place. A method that looks at one weight at a time derives
from :class:`LinearRecipe`; one that needs activations, or layers in order, overrides
:meth:`Recipe.compress_layers` itself.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from torch import nn

# Called with the number of layers done, the number of all, and the name of the last one done.
Progress = Callable[[int, int, str], None]

_RECIPES: dict[str, type[Recipe]] = {}


class Recipe(ABC):
    """Settings of a compression method. Subclasses are frozen dataclasses."""

    name: ClassVar[str]

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
    def compress_layers(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Linear],
        calibration: Iterable[Any] | None,
        progress: Progress,
    ) -> dict[str, nn.Module]:
        """Replacements for the given layers of the model, which is left as it is.

        Errors name the layer.
        """

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

    def compress_layers(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Linear],
        calibration: Iterable[Any] | None,
        progress: Progress,
    ) -> dict[str, nn.Module]:
        replacements = {}
        for done, (name, linear) in enumerate(layers.items(), start=1):
            try:
                replacements[name] = self.compress_linear(linear)
            except (TypeError, ValueError) as error:
                raise type(error)(f"layer {name!r}: {error}") from error
            progress(done, len(layers), name)
        return replacements


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
