"""Methods that need to see what layers are given: stages run block by block, and their stacking."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from pumice._calibrate import Measurement
from pumice.calibration import Stage, run
from pumice.quantize.recipe import Outcome, Recipe, Task


class CalibratedRecipe(Recipe):
    """A method made of stages that :func:`pumice.calibration.run` does to each block."""

    @abstractmethod
    def stages(self) -> list[Stage]:
        """Its steps, in order."""

    def apply(self, task: Task) -> Outcome:
        return apply_in_turn([self], task)


def apply(recipes: Sequence[Recipe], task: Task) -> Outcome:
    """Apply one recipe, or several in turn."""
    if len(recipes) == 1:
        return recipes[0].apply(task)
    return apply_in_turn(recipes, task)


def apply_in_turn(recipes: Sequence[Recipe], task: Task) -> Outcome:
    """Do the stages of several recipes to each block; the last recipe compresses it."""
    stages: list[Stage] = []
    for recipe in recipes:
        own = recipe.stages()
        if own is None:
            raise TypeError(
                f"compress: {type(recipe).__name__} does not go through the model block by block "
                "and cannot be combined with other recipes"
            )
        stages += own
    names = " and ".join(type(recipe).__name__ for recipe in recipes)
    for recipe in recipes[:-1]:
        if recipe.compresses:
            raise ValueError(
                f"compress: {type(recipe).__name__} compresses the layers, so nothing can follow "
                "it; only the last recipe of a list may do that"
            )
    last = recipes[-1]
    if not last.compresses:
        raise ValueError(
            f"compress: {type(last).__name__} only prepares the weights; follow it with a recipe "
            f"that compresses them: [{type(last).__name__}(…), pumice.GPTQ(…)]"
        )
    if task.calibration is None:
        raise ValueError(
            f"compress: {names} needs calibration data: pass calibration=[inputs of the model, …]"
        )

    result = run(
        task.model,
        task.layers,
        task.calibration,
        stages,
        last.compress_outside,
        settings=task.settings,
        fingerprint={
            "recipes": [recipe.to_dict() for recipe in recipes],
            "layers": list(task.layers),
        },
        progress=task.progress,
    )
    errors = {
        name: Measurement(squared_error=error**2, squared_norm=1.0, calls=1)
        for name, error in result.errors.items()
    }
    return Outcome(result.replacements, errors)
